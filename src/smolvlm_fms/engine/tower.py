"""The vision towers on the CPU in bf16: packed linears, residual additions inside them, and attention without a softmax
matrix in memory (our kernel) or two heads at a time (torch alone). One tile at a time: batches gain nothing here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.linears import make_linear
from smolvlm_fms.engine.packed import kernel_blocks
from smolvlm_fms.errors import InputError
from smolvlm_fms.modules.connector import pixel_unshuffle
from smolvlm_fms.modules.vision import SiglipTower, position_ids

__all__ = ["PackedLlavaTower", "PackedTower", "full_attention"]

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
    # The same memory for all heads: fresh megabytes cost a page fault every 4 KB.
    some = min(HEADS_AT_ONCE, heads)
    scores, weights = (qkv_T3HD.new_empty(some, tokens, tokens) for _ in range(2))
    attended = qkv_T3HD.new_empty(some, tokens, width)
    for head in range(0, heads, HEADS_AT_ONCE):
        part = slice(head, head + HEADS_AT_ONCE)
        if heads - head < some:  # the last of an odd number
            some = heads - head
            scores, weights, attended = scores[:some], weights[:some], attended[:some]
        keys = key_HTD[part].transpose(1, 2)
        torch.baddbmm(scores, query_HTD[part], keys, beta=0, alpha=scale, out=scores)  # beta 0: not added
        if hidden is not None:
            scores += hidden
        torch.softmax(scores, -1, out=weights)
        out_THD[:, part] = torch.bmm(weights, value_HTD[part], out=attended).transpose(0, 1)
    return out_THD.flatten(1)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    if norm.native:
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class _Blocks:
    """Patch projection and blocks of a tower whose linears ``packed.pack_blocks`` has packed."""

    def __init__(self, tower: SiglipTower, depth: int) -> None:
        self.tower = tower
        conv = tower.embeddings.patch_embedding
        self._patches = make_linear(conv.weight.detach().flatten(1), conv.bias)
        # fp32 copies of the few norm weights, so that they are not widened on every call
        blocks: list[Any] = list(tower.layers[:depth])
        self._blocks = [(block, _Norm(block.ln1), _Norm(block.ln2)) for block in blocks]
        self._native = kernel_blocks(tower, depth) if kernels.available() else None

    def patches(self, pixels_CHW: Tensor) -> Tensor:
        """Patches side by side as rows: (P, C * patch * patch) bf16."""
        patch = self.tower.config.patch_size
        rows, cols = pixels_CHW.shape[1] // patch, pixels_CHW.shape[2] // patch
        whole = pixels_CHW[:, : rows * patch, : cols * patch].to(torch.bfloat16)
        return whole.reshape(-1, rows, patch, cols, patch).permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)

    def run(self, hidden_PD: Tensor, key_mask_P: Tensor | None, taps: Collection[int]) -> list[Tensor]:
        """Hidden states (P, D) after so many blocks as each of ``taps`` says, in ascending order."""
        if self._native is not None:
            return self._run_native(hidden_PD, key_mask_P, sorted(set(taps)))
        heads, width = self.tower.config.num_attention_heads, self.tower.config.head_dim
        states = [hidden_PD] if 0 in taps else []
        for done, (block, first_norm, second_norm) in enumerate(self._blocks, 1):
            qkv = block.attn.in_proj.linear(_layer_norm(hidden_PD, first_norm))
            attended_PD = full_attention(qkv.view(-1, 3, heads, width), key_mask_P, width**-0.5)
            hidden_PD = block.attn.dense(attended_PD, residual=hidden_PD)
            grown = block.mlp.hidden(_layer_norm(hidden_PD, second_norm))
            hidden_PD = block.mlp.down(grown, residual=hidden_PD)
            if done in taps:
                states.append(hidden_PD)
        return states

    def _run_native(self, hidden_PD: Tensor, key_mask_P: Tensor | None, taps: list[int]) -> list[Tensor]:
        """The same in one call of our kernels from tap to tap."""
        assert self._native is not None
        states, done = [], 0
        for tap in taps:
            hidden_PD = self._native.run(hidden_PD, key_mask_P, done, tap) if tap > done else hidden_PD
            states.append(hidden_PD)
            done = tap
        return states


class PackedTower(_Blocks):
    """SmolVLM's tower and connector, of a model that ``packed.pack_smolvlm`` has packed."""

    def __init__(self, tower: SiglipTower, connector: Any) -> None:
        super().__init__(tower, len(tower.layers))
        self.connector = connector
        self._last_norm = _Norm(tower.post_layernorm)

    def __call__(self, tiles_NCHW: Tensor, patch_mask_NHW: Tensor | None = None) -> Tensor:
        """Image tokens (N, tokens per tile, D), bf16, of tiles (N, C, H, W); the mask marks real patches."""
        features = []
        for tile, pixels_CHW in enumerate(tiles_NCHW):
            mask_HW = None if patch_mask_NHW is None else patch_mask_NHW[tile]
            mask_P = None if mask_HW is None else mask_HW.flatten()
            (hidden_PD,) = self.run(self._embed(pixels_CHW, mask_HW), mask_P, (len(self._blocks),))
            hidden_PD = _layer_norm(hidden_PD, self._last_norm)
            folded_1TD = pixel_unshuffle(hidden_PD[None], self.connector.scale_factor)
            features.append(self.connector.proj(folded_1TD))
        return torch.cat(features)

    def _embed(self, pixels_CHW: Tensor, mask_HW: Tensor | None) -> Tensor:
        """Patches times the projection, plus positions: (P, D)."""
        config = self.tower.config
        rows, cols = (size // config.patch_size for size in pixels_CHW.shape[1:])
        table = self.tower.embeddings.position_embedding.weight
        side = config.patches_per_side
        if mask_HW is None and (rows, cols) == (side, side):
            positions_PD = table
        else:
            mask = torch.ones(rows, cols, dtype=torch.bool) if mask_HW is None else mask_HW
            positions_PD = F.embedding(position_ids(mask[None], side)[0], table)
        hidden: Tensor = self._patches(self.patches(pixels_CHW), residual=positions_PD)
        return hidden


class PackedLlavaTower(_Blocks):
    """LLaVA-Next's tower (SigLIP's, or CLIP's with its class token) and projector: tapped features, two linears.

    layers: the taps, counted as transformers counts hidden states.
    """

    def __init__(self, tower: SiglipTower, projector: Any, layers: Sequence[int]) -> None:
        total = len(tower.layers)
        self._taps = [layer if layer >= 0 else total + 1 + layer for layer in layers]
        super().__init__(tower, max(self._taps))
        self.projector = projector
        embeddings: Any = tower.embeddings
        self._class_token = hasattr(embeddings, "class_embedding")
        self._first_norm = _Norm(embeddings.pre_layernorm) if self._class_token else None

    def __call__(self, tiles_NCHW: Tensor) -> Tensor:
        """The tokens (N, P, D), bf16, of whole tiles (N, C, H, W)."""
        side = self.tower.config.image_size
        if tuple(tiles_NCHW.shape[2:]) != (side, side):
            raise InputError(f"A tile must have {side} × {side} pixels; {tuple(tiles_NCHW.shape)} came.")
        features = []
        for pixels_CHW in tiles_NCHW:
            states = dict(
                zip(sorted(set(self._taps)), self.run(self._embed(pixels_CHW), None, self._taps), strict=True)
            )
            tapped_PF = torch.cat([states[tap] for tap in self._taps], -1)
            features.append(self.projector(tapped_PF[1:] if self._class_token else tapped_PF))
        return torch.stack(features)

    def _embed(self, pixels_CHW: Tensor) -> Tensor:
        """(P, D), or (1 + P, D) with a class token."""
        embeddings: Any = self.tower.embeddings
        table, patches_PK = embeddings.position_embedding.weight, self.patches(pixels_CHW)
        if self._first_norm is None:
            whole: Tensor = self._patches(patches_PK, residual=table)
            return whole
        patches_PD = self._patches(patches_PK, residual=table[1:])
        hidden_PD = torch.cat((embeddings.class_embedding[None] + table[:1], patches_PD))
        return _layer_norm(hidden_PD, self._first_norm)


class _Norm:
    """A LayerNorm's numbers, in fp32 for our kernels and in bf16 for torch's."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        self.native = kernels.available()  # asked now: torch.compile cannot look at files
        dtype = torch.float32 if self.native else torch.bfloat16
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
        self.eps, self.normalized_shape = norm.eps, list(norm.normalized_shape)
