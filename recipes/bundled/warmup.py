"""Teach the tower to see before it learns to speak: what does each patch show, of which colour, how large, where?

The generator knows the answers for each of the 64 patches, so one picture gives hundreds of targets where a question
gives one.
Writes `tower.pt` (tower, symbols, optimisers) into the run folder every few minutes; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from smolvlm_fms.modules.vision import SiglipTower
from torch import Tensor, nn

import skills
from shape import config, tokenizer
from sources import DEFAULT_WORK
from stream import Stream, loader, normalise
from symbols import Symbols, total


@torch.no_grad()
def accuracy(features_NPD: Tensor, symbols: Symbols, batch: dict[str, Any]) -> dict[str, float]:
    """Share of object patches named rightly, per skill."""
    kinds = batch["targets"][:, 0]
    right = symbols.logits(features_NPD, "kind").argmax(-1) == kinds
    result = {}
    for skill in skills.SINGLE_PICTURE:
        rows = torch.tensor([s == skill for s in batch["skills"]])
        objects = (kinds > 0) & rows[:, None]
        if objects.any():
            result[skill] = round(right[objects].float().mean().item(), 3)
    return result


class Warmup(nn.Module):
    """Tower and symbols in one, so that processes can share their gradients."""

    def __init__(self, tower: SiglipTower, width: int) -> None:
        super().__init__()
        self.tower, self.symbols = tower, Symbols(width)

    def features(self, pixels_NCHW: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            features_NPD: Tensor = self.tower(pixels_NCHW)
        return features_NPD.float()

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        features = self.features(normalise(batch["pixels"]))
        return self.symbols.losses(features, batch["targets"]), features.detach()


def grid_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column (side², width): where the tower's learnt positions start from.

    Neighbours are alike from the first step on, which a tower from nothing otherwise has to find out
    (the start that arXiv 2205.01580 uses for small ViTs).
    """
    rates = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles_SF = torch.arange(side)[:, None] * rates * 2
    waves_SD = torch.cat([angles_SF.sin(), angles_SF.cos()], 1)
    rows = waves_SD[:, None].expand(side, side, -1)
    columns = waves_SD[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


@torch.no_grad()
def whiten(tower: SiglipTower, pixels_NHWC: Tensor, scale: float = 0.5) -> None:
    """Start the patch projection from the principal components of these pictures' patches, each of the same variance.

    At random it would report little but a patch's mean colour, because that is where nearly all variance is (the start
    of arXiv 2404.00498's first layer).
    """
    projection = tower.embeddings.patch_embedding
    side = projection.kernel_size[0]
    patches_KV = F.unfold(normalise(pixels_NHWC), side, stride=side).transpose(1, 2).flatten(0, 1)
    mean = patches_KV.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((patches_KV - mean).T))
    variances, directions = variances[-projection.out_channels :], directions[:, -projection.out_channels :]
    weight = scale * (directions / (variances + 1e-4 * variances.max()).sqrt()).T
    projection.weight.copy_(weight.view_as(projection.weight))
    projection.bias.copy_(-weight @ mean)


def build_optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


def save(model: Warmup, optimisers: list[torch.optim.Optimizer], seen: int, step: int, folder: Path) -> None:
    state = {"tower": model.tower.state_dict(), "symbols": model.symbols.state_dict(), "seen": seen, "step": step}
    torch.save(state | {"optimisers": [one.state_dict() for one in optimisers]}, folder / "tower.part")
    (folder / "tower.part").replace(folder / "tower.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--pictures", type=int, default=38_400, help="stop after so many, all processes together")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step, of each process")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vision = config(tokenizer(args.work)).vision
    tower = SiglipTower(vision)
    tower.reset_parameters()
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.copy_(
            grid_positions(vision.patches_per_side, vision.hidden_size) * 0.1
        )
    whiten(tower, next(iter(Stream(args.work, 256, start=9_000_000)))["pixels"])
    model = Warmup(tower, vision.hidden_size)
    run = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimisers = build_optimisers(model, args.lr)
    begin, seen, step = time.time(), 0, 0
    recent: defaultdict[str, float] = defaultdict(float)
    if (args.out / "tower.pt").exists():
        state = torch.load(args.out / "tower.pt", weights_only=True)
        tower.load_state_dict(state["tower"])
        model.symbols.load_state_dict(state["symbols"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        seen, step = state["seen"], state["step"]
    for batch in loader(args.work, args.batch, 10_000_000 + seen, rank, world):
        if seen >= args.pictures:
            break
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = args.lr * min(1, (step + 1) / 100)
        losses, features = run(batch)
        model.zero_grad(set_to_none=True)
        total(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        for field, loss in losses.items():
            recent[field] += float(loss.detach().nan_to_num(0)) / 50
        seen, step = seen + args.batch * world, step + 1
        if step % 50 == 0 and rank == 0:
            took = time.time() - begin
            shown = {field: round(value, 3) for field, value in recent.items()}
            right = accuracy(features, model.symbols, batch)
            line = json.dumps({"step": step, "samples": seen, "seconds": round(took), "loss": shown, "right": right})
            print(line, flush=True)
            with (args.out / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        if step % 50 == 0:
            recent.clear()
        if step % 100 == 0 and rank == 0:
            save(model, optimisers, seen, step, args.out)
    if rank == 0:
        save(model, optimisers, seen, step, args.out)
        held_out = next(iter(Stream(args.work, 1200, start=1, held_out=True)))
        with torch.no_grad():
            features = torch.cat([model.features(normalise(p)) for p in held_out["pixels"].split(100)])
            print("held out:", accuracy(features, model.symbols, held_out), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
