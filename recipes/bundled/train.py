"""Train the bundled model with the project's own trainer; the same command resumes.

python recipes/bundled/train.py --imagine 0.05 --batch 8 --config recipes/bundled/text.yaml
torchrun --nproc-per-node 2 recipes/bundled/train.py --tower runs/warmup/tower.pt --text runs/text --batch 16 \
    --config recipes/bundled/train.yaml
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from smolvlm_fms.model.smolvlm import SmolVLM
from smolvlm_fms.training import TrainConfig, Trainer
from torch import Tensor, nn

from export import export, latest
from shape import config, tokenizer
from sighted import DenseBatches, Sighted
from sources import DEFAULT_WORK
from stream import Stream, normalise
from symbols import Symbols


def build(work: Path) -> SmolVLM:
    """The model at random."""
    torch.manual_seed(0)
    model = SmolVLM(config(tokenizer(work)))
    model.reset_parameters()
    model.post_init()
    return model


def least_squares(features_KD: Tensor, wanted_KD: Tensor) -> tuple[Tensor, float]:
    """The matrix that takes features nearest to what is wanted, and the share of its variance that they explain."""
    squares = features_KD.T @ features_KD
    squares += 1e-3 * squares.diagonal().mean() * torch.eye(len(squares))
    matrix = torch.linalg.solve(squares, features_KD.T @ wanted_KD)
    return matrix, float(1 - (features_KD @ matrix - wanted_KD).var() / wanted_KD.var())


@torch.no_grad()
def translate(model: SmolVLM, symbols: Symbols, work: Path, pictures: int = 1500) -> float:
    """Change the connector from the symbols' language to the tower's; returns how much of the symbols it explains."""
    batch = next(iter(Stream(work, pictures, start=20_000_000)))
    features = torch.cat([model.vision_tower(normalise(pixels)) for pixels in batch["pixels"].split(100)])
    matrix, explained = least_squares(features.flatten(0, 1), symbols.describe(batch["targets"]).flatten(0, 1))
    model.connector.proj.weight.copy_(model.connector.proj.weight @ matrix.T)
    return explained


def main() -> None:
    # PyTorch's fused attention for CPUs is slow going backward at 64 patches; plain matrix products are faster.
    torch.backends.cuda.enable_flash_sdp(False)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--imagine", type=float, help="train the text model alone, on symbols with this much noise")
    parser.add_argument("--tower", type=Path, help="the warm-up's tower.pt")
    parser.add_argument("--text", type=Path, help="the run of --imagine")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dense", type=float, default=1.0, help="weight of the loss that names patches")
    parser.add_argument("overrides", nargs="*", help="key=value, such as steps=200 run=runs/try")
    args = parser.parse_args()
    settings = TrainConfig.load(args.config, args.overrides)
    smolvlm = build(args.work)
    symbols = Symbols(smolvlm.config.vision.hidden_size)
    batches = DenseBatches(args.work, args.batch, smolvlm.config.pad_token_id or 0, pixels=args.imagine is None)
    if args.text is not None:
        latest(args.text, smolvlm, wanted=("connector.", "text_model."))
    if args.tower is not None:
        warm = torch.load(args.tower, weights_only=True)
        smolvlm.vision_tower.load_state_dict(warm["tower"])
        symbols.load_state_dict(warm["symbols"])
        print(f"the tower's features explain {translate(smolvlm, symbols, args.work):.0%} of the symbols", flush=True)
    model: nn.Module = Sighted(smolvlm, symbols, batches, args.dense, args.imagine)
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

    def save(trained: nn.Module, folder: Path) -> None:
        export(smolvlm, args.work, folder)

    Trainer(settings, model, batches, save_final=save if first else None).run()


if __name__ == "__main__":
    main()
