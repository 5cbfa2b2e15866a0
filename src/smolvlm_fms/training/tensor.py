"""Tensor parallelism for the text backbone: neighbouring processes hold a part of every layer (arXiv 1909.08053).

    x (all of it) ─▶ query, key, value: some heads  ─▶ attention ─▶ dense: a partial sum ─▶ all-reduce ─▶ x
    x (all of it) ─▶ wg, w1: some hidden units      ─▶ product   ─▶ w2: a partial sum    ─▶ all-reduce ─▶ x

Embeddings, norms, head, tower and connector are whole on each of them (and sharded over the others by FSDP).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from smolvlm_fms.errors import ConfigurationError

__all__ = ["by_mesh", "clip_over_meshes", "split_layers"]


def split_layers(model: Any, mesh: DeviceMesh) -> None:
    """Split the linears of every text layer over ``mesh`` (one axis), in place.

    Raises ConfigurationError where heads or hidden units cannot be divided, or linears are fused.
    """
    text, parts = model.config.text, mesh.size()
    for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(text, what) % parts:
            raise ConfigurationError(
                f"parallel.tensor {parts} does not divide the text's {what}, {getattr(text, what)}."
            )
    if model.config.fused_weights:
        raise ConfigurationError("parallel.tensor splits single linears; load the model with fused_weights=False.")
    # It remarks on every weight that is gathered for ``final/``, along two axes of the mesh.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    whole = Replicate()
    plan: dict[str, Any] = {
        # One conversion of the input for three linears is one all-reduce in the backward pass in place of three.
        "attn": PrepareModuleInput(input_kwarg_layouts={"q": whole}, desired_input_kwarg_layouts={"q": whole}),
        "attn.in_proj.query": ColwiseParallel(),
        "attn.in_proj.key": ColwiseParallel(),
        "attn.in_proj.value": ColwiseParallel(),
        "attn.dense": RowwiseParallel(),
        "ff_sub_layer": PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,)),
        "ff_sub_layer.wg": ColwiseParallel(),
        "ff_sub_layer.w1": ColwiseParallel(),
        "ff_sub_layer.w2": RowwiseParallel(),
    }
    for layer in model.text_model.base_model.layers:
        parallelize_module(layer, mesh, plan)
        layer.attn.nheads //= parts
        layer.attn.kvheads //= parts


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups that lie on the same processes: operators on lists cannot mix them."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def clip_over_meshes(parameters: Iterable[nn.Parameter], most: float, world: int) -> float:
    """``clip_grad_norm_`` for parameters that lie on different meshes of ``world`` processes; returns the norm."""
    groups = by_mesh([p for p in parameters if p.grad is not None])
    squares = torch.zeros((), dtype=torch.float64)
    for gradient in (p.grad for group in groups for p in group):
        assert isinstance(gradient, DTensor)
        axes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
        pieces = math.prod(size for size, placement in axes if not placement.is_replicate())
        local = gradient.to_local().double().square().sum().cpu()
        squares += local * pieces / world  # as many processes have the same piece
    dist.all_reduce(squares)
    norm = squares.sqrt()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, most, norm.float().to(group[0].device))
    return float(norm)
