"""The blocks of a vision tower on the CPU kernels: all of them, or those between two taps, in one call.

P patches (and a class token, where there is one), D width.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvlm_fms.engine.kernels import loader
from smolvlm_fms.engine.kernels.linear import ACTIVATIONS, PackedLinear
from smolvlm_fms.engine.kernels.registry import operator, require_bf16
from smolvlm_fms.errors import ConfigurationError, InputError

_handles = itertools.count()
_towers: weakref.WeakValueDictionary[int, PackedBlocks] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class TowerLayer:
    """One pre-norm block. ``qkv`` joins query, key and value; ``up`` carries the activation; norms are (D,)."""

    qkv: PackedLinear
    out: PackedLinear
    up: PackedLinear
    down: PackedLinear
    attention_norm: tuple[Tensor, Tensor]
    mlp_norm: tuple[Tensor, Tensor]


class PackedBlocks:
    """Blocks of a SigLIP or CLIP tower, all ``"bf16"`` or all ``"int8_channel"``. The residual stream is fp32 inside a
    call."""

    def __init__(self, layers: Sequence[TowerLayer], *, heads: int, head_dim: int, eps: float) -> None:
        """Raises: ConfigurationError for linears of different kinds or of sizes that do not fit together."""
        self.layers = tuple(layers)
        self.width = self.layers[0].qkv.in_features
        self._check(heads, head_dim)
        pairs = [pair for layer in self.layers for pair in (layer.attention_norm, layer.mlp_norm)]
        self._floats = [tensor.detach().float().contiguous() for pair in pairs for tensor in pair]
        array = (loader.TowerLayer * len(self.layers))()
        for i, layer in enumerate(self.layers):
            parts = (layer.qkv, layer.out, layer.up, layer.down)
            pointers = [norm.data_ptr() for norm in self._floats[4 * i : 4 * i + 4]]
            array[i] = loader.TowerLayer(*(part.c_weights() for part in parts), *pointers)
        self._array = array
        self.c_tower = loader.Tower(
            layers=len(self.layers),
            width=self.width,
            heads=heads,
            d=head_dim,
            ff=self.layers[0].up.out_features,
            activation=ACTIVATIONS[self.layers[0].up.activation],
            layer=array,
            eps=eps,
            attention_scale=head_dim**-0.5,
        )
        self.handle = next(_handles)
        _towers[self.handle] = self

    def _check(self, heads: int, head_dim: int) -> None:
        first, attended = self.layers[0], heads * head_dim
        if head_dim % 2 or not 0 < head_dim <= 256:
            raise ConfigurationError(f"the kernels need an even head_dim up to 256; it is {head_dim}")
        for layer in self.layers:
            parts = (layer.qkv, layer.out, layer.up, layer.down)
            sizes = [(part.in_features, part.out_features) for part in parts]
            ff = first.up.out_features
            wanted = [(self.width, 3 * attended), (attended, self.width), (self.width, ff), (ff, self.width)]
            kinds = {part.kind for part in parts} | {first.qkv.kind}
            plain = all(part.activation == "none" for part in (layer.qkv, layer.out, layer.down))
            if sizes != wanted or len(kinds) > 1 or not plain or layer.up.activation != first.up.activation:
                raise ConfigurationError(
                    f"a block's linears must be {wanted}, of one kind, the activation in `up` alone; got {sizes}, "
                    f"{sorted(kinds)}"
                )
        if first.qkv.kind not in ("bf16", "int8_channel") or first.up.activation == "swiglu":
            raise ConfigurationError(f"a tower is bf16 or int8_channel; got {first.qkv.kind}, {first.up.activation}")

    def run(self, hidden_PD: Tensor, key_mask_P: Tensor | None = None, first: int = 0, last: int = -1) -> Tensor:
        """Hidden states (P, D) bf16 through the blocks ``first`` … ``last`` (not included; -1: to the end).

        ``key_mask_P`` (bool) is False for patches that nobody sees. Raises: InputError for another dtype or shape.
        """
        last = len(self.layers) if last < 0 else last
        require_bf16("hidden", hidden_PD)
        if hidden_PD.dim() != 2 or hidden_PD.shape[1] != self.width or not len(hidden_PD):
            raise InputError(f"hidden must be (patches, {self.width}); got {tuple(hidden_PD.shape)}")
        if key_mask_P is not None and key_mask_P.shape != hidden_PD.shape[:1]:
            raise InputError(f"the mask must be ({len(hidden_PD)},); got {tuple(key_mask_P.shape)}")
        if not 0 <= first <= last <= len(self.layers):
            raise InputError(f"blocks {first} … {last} are not among the {len(self.layers)} here")
        out: Tensor = torch.ops.smolvlm_fms.tower_blocks(hidden_PD, key_mask_P, self.handle, first, last)
        return out


def _tower_blocks(hidden: Tensor, key_mask: Tensor | None, handle: int, first: int, last: int) -> Tensor:
    hidden = hidden.contiguous()
    mask = None if key_mask is None else key_mask.to(torch.bool).contiguous()
    out = torch.empty_like(hidden)
    args = loader.TowerArgs(
        hidden=hidden.data_ptr(),
        out=out.data_ptr(),
        key_mask=loader.pointer(mask),
        tokens=len(hidden),
        first=first,
        last=last,
        threads=torch.get_num_threads(),
    )
    loader.check(loader.library().svk_tower_blocks(_towers[handle].c_tower, args), "tower_blocks")
    return out


def _tower_blocks_fake(hidden: Tensor, key_mask: Tensor | None, handle: int, first: int, last: int) -> Tensor:
    return torch.empty_like(hidden)


operator(
    "tower_blocks(Tensor hidden, Tensor? key_mask, int tower, int first, int last) -> Tensor",
    _tower_blocks,
    _tower_blocks_fake,
)
