"""One process or many: who this process is, sums over all of them, and the model in shards (FSDP2).

    torchrun ─▶ started() ─▶ Group ─▶ shard(model): every block of tower and text, then the rest

    processes = replicas × shards × tensor      (HSDP: each replica is sharded for itself; tensor: see ``tensor.py``)

Processes that share layers (``tensor``) read the same micro-batches, all others different ones of the same step.
Gradients are averaged over those, so a run's curve is that of one process with the same ``accumulate``.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.training.config import ParallelConfig
from smolvlm_fms.training.samples import IGNORE, Batch
from smolvlm_fms.training.tensor import split_layers

__all__ = ["Group", "blank_copy", "check_parallel", "reshard", "shard", "started", "whole_model", "with_tiles"]


@dataclass(frozen=True)
class Group:
    """The processes of a run; ``tensor`` neighbours share each layer and read the same micro-batches."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tensor: int = 1

    @property
    def reader(self) -> int:
        """Which of the ``readers`` streams of micro-batches this process takes."""
        return self.rank // self.tensor

    @property
    def readers(self) -> int:
        """How many different micro-batches the processes work on at a time."""
        return self.world // self.tensor

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs."""
        return self.rank == 0

    def total(self, *values: Tensor | float) -> list[float]:
        """Sum each value over all processes that read different micro-batches, in float64."""
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu").detach() for v in values])
        if self.world > 1:
            dist.all_reduce(sums)
        return [float(value) / self.tensor for value in sums]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            self.total(0.0)


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[Group]:
    """The group that ``torchrun`` describes in the environment, or one process; taken down at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        world = dist.get_world_size() if dist.is_initialized() else 1
        yield Group(dist.get_rank() if world > 1 else 0, world, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # Numbers for the logs and checkpoints go over gloo, tensors on a GPU over NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def check_parallel(world: int, config: ParallelConfig) -> None:
    """Raise ConfigurationError where ``world`` processes cannot be laid out as the configuration says."""
    if world % (config.replicas * config.tensor):
        raise ConfigurationError(
            f"parallel.replicas {config.replicas} × parallel.tensor {config.tensor} does not divide {world} "
            f"{'processes' if world > 1 else 'process (torchrun starts several)'}."
        )


def shard(model: nn.Module, group: Group, config: ParallelConfig, half: bool) -> None:
    """Shard parameters in place. ``half``: compute in bfloat16, add gradients up in float32."""
    check_parallel(group.world, config)
    sizes = {
        "replicate": config.replicas,
        "shard": group.world // (config.replicas * config.tensor),
        "tensor": config.tensor,
    }
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    mesh = init_device_mesh(group.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))
    if config.tensor > 1:
        split_layers(model, mesh["tensor"])
    options: dict[str, Any] = {"mesh": mesh["replicate", "shard"] if config.replicas > 1 else mesh["shard"]}
    if half:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, **options)
    fully_shard(model, **options)


def reshard(model: nn.Module) -> None:
    """Give up gathered weights: without a backward pass, FSDP leaves the outermost ones whole after ``forward``."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def with_tiles(batch: Batch, config: Any) -> Batch:
    """``batch``, with a row of one blank tile where it has no pictures.

    Sharded towers are gathered by all processes together, so each of them has to run it. Nothing is learnt there.
    """
    if "pixel_values" in batch:
        return batch
    rows, length = batch["input_ids"].shape
    side, channels = config.vision.image_size, config.vision.num_channels
    pixels: Batch = {"pixel_values": torch.zeros(rows + 1, 1, channels, side, side)}
    tokens = config.tokens_per_tile
    if hasattr(config, "resolution"):  # LLaVA-Next: a picture of one tile's size, and its overview
        size = (side, side)
        tokens = config.resolution.num_tokens(size)
        pixels = {"pixel_values": torch.zeros(config.resolution.num_tiles(size), channels, *size)}
        pixels["image_sizes"] = torch.tensor([size])
    wide = max(length, tokens)
    fill = {"input_ids": 0, "labels": IGNORE, "segments": 0, "position_ids": 0}
    grown: Batch = {}
    for name, value in fill.items():
        if name in batch:
            grown[name] = torch.full((rows + 1, wide), value, dtype=torch.int64)
            grown[name][:rows, :length] = batch[name]
    grown["input_ids"][rows, :tokens] = config.image_token_id
    return grown | pixels


def blank_copy(model: nn.Module) -> nn.Module:
    """The same modules with parameters that have no storage, to be filled by ``whole_model``; before sharding."""
    parameters: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        parameters[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, parameters)


def whole_model(model: nn.Module, blank: Any, group: Group) -> nn.Module | None:
    """Gather the shards of ``model`` into ``blank``, on the CPU of the first process; None on the others."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not group.is_first:
        return None
    blank.load_state_dict(state, strict=True, assign=True)
    if hasattr(blank, "post_init"):
        blank.post_init()  # ties the head again, which ``assign`` has undone
    whole: nn.Module = blank
    return whole
