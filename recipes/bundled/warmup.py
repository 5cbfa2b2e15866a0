"""Teach the tower to see before it learns to speak: what kind and colour of thing does each patch show?

The generator knows the answer for each of the 64 patches, so one picture gives 128 targets where a question gives one.
Writes `tower.pt` (the tower's state dict) into the run folder.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from smolvlm_fms.modules.vision import SiglipTower
from torch import Tensor, nn

import skills
from draw import GRID
from shape import config, tokenizer
from sources import DEFAULT_WORK
from stream import Stream, loader, normalise


class DenseHeads(nn.Module):
    """Linear readings of the tower's patch features; thrown away after the warm-up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Linear(width, len(skills.KINDS))
        self.colours = nn.Linear(width, len(skills.COLOURS))
        self.rows, self.columns = nn.Linear(width, GRID), nn.Linear(width, GRID)

    def losses(self, features_NPD: Tensor, kinds_NP: Tensor, colours_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies of kinds (background counts a fifth), colours (255: unknown, ignored) and the patch's place.

        Without the last one a tower forgets where it looks: after 50,000 conversations a linear probe found a patch's
        place in one case of five, and questions about left and right were answered by chance.
        """
        weights = torch.ones(len(skills.KINDS))
        weights[0] = 0.2
        flat = features_NPD.flatten(0, 1)
        kinds = F.cross_entropy(self.kinds(flat).float(), kinds_NP.flatten(), weights)
        colours = F.cross_entropy(self.colours(flat).float(), colours_NP.flatten(), ignore_index=255)
        rows_NP = (torch.arange(GRID * GRID) // GRID).expand(len(kinds_NP), -1)
        columns_NP = (torch.arange(GRID * GRID) % GRID).expand(len(kinds_NP), -1)
        rows = F.cross_entropy(self.rows(flat).float(), rows_NP.flatten())
        return kinds, colours, rows + F.cross_entropy(self.columns(flat).float(), columns_NP.flatten())


@torch.no_grad()
def accuracy(features_NPD: Tensor, heads: DenseHeads, batch: dict[str, Tensor]) -> dict[str, float]:
    """Share of object patches named rightly, per skill."""
    right = heads.kinds(features_NPD).argmax(-1) == batch["kinds"]
    result = {}
    for skill in skills.MIXTURE:
        rows = torch.tensor([s == skill for s in batch["skills"]])
        objects = (batch["kinds"] > 0) & rows[:, None]
        if objects.any():
            result[skill] = round(right[objects].float().mean().item(), 3)
    return result


class Warmup(nn.Module):
    """Tower and heads in one, so that processes can share their gradients."""

    def __init__(self, tower: SiglipTower, width: int) -> None:
        super().__init__()
        self.tower, self.heads = tower, DenseHeads(width)

    def features(self, pixels_NCHW: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            features_NPD: Tensor = self.tower(pixels_NCHW)
        return features_NPD.float()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = self.features(normalise(batch["pixels"]))
        return *self.heads.losses(features, batch["kinds"], batch["colours"]), features.detach()


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


def build_optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--minutes", type=float, default=12)
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
    model = Warmup(tower, vision.hidden_size)
    run = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimisers = build_optimisers(model, args.lr)
    begin, seen, step, recent = time.time(), 0, 0, torch.zeros(2)
    for batch in loader(args.work, args.batch, 10_000_000, rank, world):
        done = (time.time() - begin) / 60 / args.minutes
        if world > 1:  # the processes' clocks must agree on the last step
            clock = torch.tensor(done)
            dist.broadcast(clock, 0)
            done = float(clock)
        if done >= 1:
            break
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * done))
        kinds, colours, places, features = run(batch)
        model.zero_grad(set_to_none=True)
        (kinds + 0.5 * colours + 0.2 * places).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        recent = recent + torch.stack([kinds.detach(), colours.detach()]) / 50
        seen, step = seen + args.batch * world, step + 1
        if step % 50 == 0 and rank == 0:
            took = time.time() - begin
            print(
                f"{took:.0f}s {seen} {seen / took:.0f}/s kinds {recent[0]:.3f} colours {recent[1]:.3f}",
                accuracy(features, model.heads, batch),
                flush=True,
            )
        if step % 50 == 0:
            recent = torch.zeros(2)
        if step % 1000 == 0 and rank == 0:
            torch.save(
                {"tower": tower.state_dict(), "heads": model.heads.state_dict(), "seen": seen}, args.out / "tower.pt"
            )
    if rank == 0:
        torch.save(
            {"tower": tower.state_dict(), "heads": model.heads.state_dict(), "seen": seen}, args.out / "tower.pt"
        )
        held_out = next(iter(Stream(args.work, 1200, start=1, held_out=True)))
        with torch.no_grad():
            features = torch.cat([model.features(normalise(p)) for p in held_out["pixels"].split(100)])
            print("held out:", accuracy(features, model.heads, held_out), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
