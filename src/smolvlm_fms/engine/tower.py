"""The SigLIP tower on the CPU in bf16: packed linears, residual additions inside them, and attention without a softmax
matrix in memory (our kernel) or two heads at a time (torch alone). One tile at a time: batches gain nothing here."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.linears import make_linear
from smolvlm_fms.modules.connector import pixel_unshuffle
from smolvlm_fms.modules.vision import SiglipTower, position_ids

__all__ = ["PackedTower", "full_attention"]

HEADS_AT_ONCE = 2
"""Heads whose scores are in memory together on the torch path: more fall out of the cache."""


def full_attention(qkv_T3HD: Tensor, key_mask_T: Tensor | None, scale: float) -> Tensor:
    """Bidirectional attention: queries, keys, values (T, 3, H, D) bf16 to (T, H * D) bf16."""
    if kernels.available():
        mask = None if key_mask_T is None else key_mask_T[None]
        return kernels.vision_attention(qkv_T3HD[None], mask, scale)[0]
    tokens, _, heads, width = qkv_T3HD.shape
    query_HTD, key_HTD, value_HTD = qkv_T3HD.permute(1, 2, 0, 3)
    out_THD = qkv_T3HD.new_empty(tokens, heads, width)
    hidden = None if key_mask_T is None else torch.where(key_mask_T, 0.0, float("-inf")).to(qkv_T3HD.dtype)
    for head in range(0, heads, HEADS_AT_ONCE):
        some = slice(head, head + HEADS_AT_ONCE)
        scores = torch.bmm(query_HTD[some] * scale, key_HTD[some].transpose(1, 2))
        if hidden is not None:
            scores += hidden
        out_THD[:, some] = torch.bmm(scores.softmax(-1), value_HTD[some]).transpose(0, 1)
    return out_THD.flatten(1)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    if kernels.available():
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class PackedTower:
    """Tower and connector of a model whose linears ``packed.pack_tower`` has packed."""

    def __init__(self, tower: SiglipTower, connector: Any) -> None:
        self.tower = tower
        self.connector = connector
        conv = tower.embeddings.patch_embedding
        self._patches = make_linear(conv.weight.detach().flatten(1), conv.bias)
        # fp32 copies of the few norm weights, so that they are not widened on every call
        self._norms = [(_Norm(block.ln1), _Norm(block.ln2)) for block in tower.layers]  # type: ignore[arg-type]
        self._last_norm = _Norm(tower.post_layernorm)

    def __call__(self, tiles_NCHW: Tensor, patch_mask_NHW: Tensor | None = None) -> Tensor:
        """Image tokens (N, tokens per tile, D), bf16, of tiles (N, C, H, W); the mask marks real patches."""
        features = []
        for tile, pixels_CHW in enumerate(tiles_NCHW):
            mask_HW = None if patch_mask_NHW is None else patch_mask_NHW[tile]
            hidden_PD = self._blocks(self._embed(pixels_CHW, mask_HW), None if mask_HW is None else mask_HW.flatten())
            folded_1TD = pixel_unshuffle(hidden_PD[None], self.connector.scale_factor)
            features.append(self.connector.proj(folded_1TD))
        return torch.cat(features)

    def _embed(self, pixels_CHW: Tensor, mask_HW: Tensor | None) -> Tensor:
        """Patches times the projection, plus positions: (P, D)."""
        config = self.tower.config
        patch = config.patch_size
        rows, cols = pixels_CHW.shape[1] // patch, pixels_CHW.shape[2] // patch
        whole = pixels_CHW[:, : rows * patch, : cols * patch].to(torch.bfloat16)
        patches = whole.view(-1, rows, patch, cols, patch) if whole.is_contiguous() else None
        if patches is None:
            patches = whole.reshape(-1, rows, patch, cols, patch)
        patches_PK = patches.permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)
        table = self.tower.embeddings.position_embedding.weight
        side = config.patches_per_side
        if mask_HW is None and (rows, cols) == (side, side):
            positions_PD = table
        else:
            mask = torch.ones(rows, cols, dtype=torch.bool) if mask_HW is None else mask_HW
            positions_PD = F.embedding(position_ids(mask[None], side)[0], table)
        hidden: Tensor = self._patches(patches_PK, residual=positions_PD)
        return hidden

    def _blocks(self, hidden_PD: Tensor, key_mask_P: Tensor | None) -> Tensor:
        heads, width = self.tower.config.num_attention_heads, self.tower.config.head_dim
        blocks: list[Any] = list(self.tower.layers)
        for block, (first_norm, second_norm) in zip(blocks, self._norms, strict=True):
            qkv = block.attn.in_proj.linear(_layer_norm(hidden_PD, first_norm))
            attended_PD = full_attention(qkv.view(-1, 3, heads, width), key_mask_P, width**-0.5)
            hidden_PD = block.attn.dense(attended_PD, residual=hidden_PD)
            grown = block.mlp.hidden(_layer_norm(hidden_PD, second_norm))
            hidden_PD = block.mlp.down(grown, residual=hidden_PD)
        return _layer_norm(hidden_PD, self._last_norm)


class _Norm:
    """A LayerNorm's numbers, in fp32 for our kernels and in bf16 for torch's."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        dtype = torch.float32 if kernels.available() else torch.bfloat16
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
        self.eps, self.normalized_shape = norm.eps, list(norm.normalized_shape)
