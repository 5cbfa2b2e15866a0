"""Train the bundled model with the project's own trainer; the same command resumes.

torchrun --nproc-per-node 2 recipes/bundled/train.py --tower runs/warmup/tower.pt
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from smolvlm_fms.model.smolvlm import SmolVLM
from smolvlm_fms.training import TrainConfig, Trainer
from torch import nn

from export import export, latest
from held_out import score, show
from shape import config, tokenizer
from sighted import DenseBatches, Sighted
from sources import DEFAULT_WORK
from warmup import DenseHeads


def build(work: Path, tower: Path | None) -> SmolVLM:
    """The model at random, with the warmed-up tower if there is one."""
    torch.manual_seed(0)
    model = SmolVLM(config(tokenizer(work)))
    model.reset_parameters()
    if tower is not None:
        model.vision_tower.load_state_dict(torch.load(tower, weights_only=True)["tower"])
    model.post_init()
    return model


def main() -> None:
    # PyTorch's fused attention for CPUs is slow going backward at 64 patches; plain matrix products are faster.
    torch.backends.cuda.enable_flash_sdp(False)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--weights", type=Path, help="a run whose newest weights to start from, instead of --tower")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "train.yaml")
    parser.add_argument("--dense", type=float, default=0.3, help="weight of the loss that names patches")
    parser.add_argument("overrides", nargs="*", help="key=value, such as steps=200 run=runs/try")
    args = parser.parse_args()
    settings = TrainConfig.load(args.config, args.overrides)
    smolvlm = build(args.work, args.tower)
    batches = DenseBatches(args.work, 32, smolvlm.config.pad_token_id or 0)
    heads = DenseHeads(smolvlm.config.vision.hidden_size)
    if args.tower is not None:
        heads.load_state_dict(torch.load(args.tower, weights_only=True)["heads"], strict=False)
    elif args.weights is not None:
        latest(args.weights, smolvlm, "weights/")
        latest(args.weights, heads, "weights/", "heads.", strict=False)
    model: nn.Module = Sighted(smolvlm, heads, batches, args.dense)
    first = True
    if "RANK" in os.environ:
        # Two processes of one thread each: on busy cores twice as fast as one process of two threads. Each runs a
        # trainer of its own on its own batches, and DistributedDataParallel gives all of them the same gradients.
        dist.init_process_group("gloo")
        first = dist.get_rank() == 0
        batches.rank, batches.world = dist.get_rank(), dist.get_world_size()
        model = nn.parallel.DistributedDataParallel(model)
        model.config = smolvlm.config  # type: ignore[assignment]
        if not first:
            settings.run = settings.run / f"process{dist.get_rank()}"

    def evaluate(trained: nn.Module, step: int) -> dict[str, Any]:
        table = score(smolvlm, args.work, number=100)
        print(f"step {step}: (score, blank) {show(table)}", flush=True)
        return {f"{name}_{key}": table[name][key] for name in table for key in ("score", "blank")}

    def save(trained: nn.Module, folder: Path) -> None:
        export(smolvlm, args.work, folder)

    Trainer(settings, model, batches, evaluate=evaluate if first else None, save_final=save if first else None).run()


if __name__ == "__main__":
    main()
