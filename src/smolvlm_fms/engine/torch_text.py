"""The packed text model on torch alone: few, large operations in bf16 where FMS's blocks make many small ones.

For machines without our kernels. Keys and values lie as in the exact path's cache, (tokens, kv_heads, head_dim) each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.modules.text import TextModel

__all__ = ["TorchText", "chunked_causal_attention"]

QUERIES_AT_ONCE = 96
"""Rows of queries whose scores are in memory together: 96 rows of three heads and a thousand keys fit the cache of a
core (256 took twice as long), and rows of a chunk skip the keys that none of them may see."""


def chunked_causal_attention(query_THD: Tensor, keys_SGD: Tensor, values_SGD: Tensor, scale: float) -> Tensor:
    """The last T of S positions attend to themselves and all before: (T, H, D), (S, G, D) twice to (T, H * D)."""
    length, heads, width = query_THD.shape
    total, groups = keys_SGD.shape[:2]
    shared = heads // groups
    keys_GDS = keys_SGD.permute(1, 2, 0)
    values_GSD = values_SGD.transpose(0, 1).contiguous()
    # Heads that share keys become rows of one product: (G, shared * T, D).
    query_GRTD = query_THD.view(length, groups, shared, width).permute(1, 2, 0, 3)
    out_GRTD = torch.empty(groups, shared, length, width, dtype=query_THD.dtype)
    keys_GDS = keys_GDS.contiguous() if length > 1 else keys_GDS
    most = min(length, QUERIES_AT_ONCE)
    ahead_TT = torch.ones(most, most, dtype=torch.bool).triu_(1)
    room = [query_THD.new_empty(groups * shared * most * total) for _ in range(2)]  # for all chunks: no page faults
    for first in range(0, length, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, length)
        seen = total - length + last
        rows = last - first
        query = query_GRTD[:, :, first:last].reshape(groups, shared * rows, width)
        shape = (groups, shared * rows, seen)
        scores, weights = (memory[: groups * shared * rows * seen].view(shape) for memory in room)
        torch.baddbmm(scores, query, keys_GDS[:, :, :seen], beta=0, alpha=scale, out=scores)  # beta 0: not added
        if rows > 1:
            new = scores.view(groups, shared, rows, seen)[..., seen - rows :]
            new.masked_fill_(ahead_TT[:rows, :rows], float("-inf"))
        torch.softmax(scores, -1, out=weights)
        attended = torch.bmm(weights, values_GSD[:, :seen])
        out_GRTD[:, :, first:last] = attended.view(groups, shared, rows, width)
    return out_GRTD.permute(2, 0, 1, 3).reshape(length, heads * width)


class TorchText:
    """A text model that ``packed.pack_text`` has packed, computed layer by layer on the exact path's cache."""

    def __init__(self, text: TextModel) -> None:
        config = text.config
        assert config.num_key_value_heads is not None and config.head_dim is not None
        self.text = text
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps, self.scale, self.residual = config.rms_norm_eps, config.attention_scale, config.residual_multiplier
        rope = text.base_model.rot_emb.rope_scaling
        frequencies = rope.compute_scaled_freqs(torch.device("cpu"), 1).double()
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * frequencies
        # FMS holds query and key weights for rotating neighbours: (2i, 2i + 1) is a complex number.
        self._rotation = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, cache: Any, rows: list[tuple[int, int]]) -> Tensor:
        """Normed hidden states (B, 1, D) of the last of each row's new tokens, which is all that anybody reads.

        rows: each row's start in the cache and its past.
        """
        batch, length = positions_BT.shape
        x = (hidden_BTD * self.text.config.embedding_multiplier).flatten(0, 1)
        rotation = self._rotation[positions_BT.flatten()][:, None]
        layers: list[Any] = list(self.text.base_model.layers)
        for layer, (keys, values) in zip(layers, cache, strict=True):
            qkv = layer.attn.in_proj.linear(self._norm(x, layer.ln.weight)).view(batch * length, -1, self.width)
            turned = self.heads + self.kv_heads
            pairs = torch.view_as_complex(qkv[:, :turned].float().unflatten(-1, (-1, 2)))
            query_key = torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
            asked = 1 if layer is layers[-1] else length  # the last layer computes the last token alone
            attended = torch.empty(batch * asked, self.heads * self.width, dtype=x.dtype)
            for row, (start, past) in enumerate(rows):
                own, new = slice(row * length, (row + 1) * length), slice(start + past, start + past + length)
                keys[new], values[new] = query_key[own, self.heads :], qkv[own, turned:]
                seen = slice(start, start + past + length)
                attended[row * asked : (row + 1) * asked] = chunked_causal_attention(
                    query_key[own.stop - asked : own.stop, : self.heads], keys[seen], values[seen], self.scale
                )
            x = x.view(batch, length, -1)[:, length - asked :].flatten(0, 1)
            x = layer.attn.dense(attended, residual=x, scale=self.residual)
            grown = layer.ff_sub_layer.gate_up(self._norm(x, layer.ff_ln.weight))
            x = layer.ff_sub_layer.down(grown, residual=x, scale=self.residual)
        return self._norm(x, self.text.base_model.dec_norm.weight).view(batch, 1, -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm with its mean in fp32."""
        wide = x.float()
        inverse = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        )
        return wide.mul_(inverse).to(x.dtype).mul_(weight)
