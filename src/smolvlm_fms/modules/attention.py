"""Attention operators for FMS's ``MultiHeadAttention``: scaled dot-product attention with an unambiguous layout.

FMS's own operator tells keys (B, T, H, D) from cached keys (B, H, T, D) by their sizes, and takes one for the other
when there are as many tokens as heads. Here the operator's name says which it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fms.modules.attention import register_attention_op
from torch import Tensor

__all__ = ["CACHED", "PLAIN", "sdpa"]

PLAIN = "smolvlm_plain"
"""Attention over the tokens at hand; keys and values arrive as (B, T, H, D)."""

CACHED = "smolvlm_cached"
"""Attention over cached and new tokens; the cache holds keys and values as (B, H, T, D) and grows."""


def sdpa(
    query_BHTD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, p_dropout: float, scale: float | None, **kwargs: Any
) -> Tensor:
    """Scaled dot-product attention; returns (B, T, H, D), contiguous.

    ``mask`` in ``kwargs``: (B, T, S) or (B, H, T, S), bool (True: look) or additive. ``is_causal_mask``: causal without
    a mask, which needs as many keys as queries.
    """
    mask = kwargs.get("mask")
    causal = mask is None and bool(kwargs.get("is_causal_mask", False))
    if mask is None and not p_dropout and _trains_on_cpu(query_BHTD, key_BHSD):
        return _products(query_BHTD, key_BHSD, value_BHSD, scale, causal).transpose(1, 2).contiguous()
    if mask is not None:
        mask = mask if mask.dim() == 4 else mask[:, None]
        mask = mask.to(query_BHTD.dtype) if mask.is_floating_point() else mask
    out_BHTD = F.scaled_dot_product_attention(
        query_BHTD,
        key_BHSD,
        value_BHSD,
        attn_mask=mask,
        dropout_p=p_dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=query_BHTD.shape[1] != key_BHSD.shape[1],
    )
    return out_BHTD.transpose(1, 2).contiguous()


def _trains_on_cpu(query_BHTD: Tensor, key_BHSD: Tensor) -> bool:
    """Whether plain matrix products are quicker than torch's fused operator and their scores fit into memory.

    Its backward pass in bfloat16 takes 2 to 7 times theirs on a CPU (measured with torch 2.13: 64 tiles of 64 patches
    34 ms against 7, one row of 600 tokens 36 against 26, 2 tiles of 1,024 patches 249 against 230, both passes).
    """
    if not (query_BHTD.requires_grad and torch.is_grad_enabled() and query_BHTD.device.type == "cpu"):
        return False
    return query_BHTD.dtype == torch.bfloat16 and query_BHTD.shape[:3].numel() * key_BHSD.shape[2] <= 2**26


def _products(query_BHTD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Attention as two matrix products; several query heads share a key head by standing in its rows."""
    batch, heads, length, width = query_BHTD.shape
    kv_heads, total = key_BHSD.shape[1:3]
    scaled = query_BHTD * (width**-0.5 if scale is None else scale)
    scores = scaled.reshape(batch, kv_heads, -1, width) @ key_BHSD.transpose(-1, -2)
    if causal:
        later_TS = torch.ones(length, total, dtype=torch.bool).triu(1)
        scores = scores.view(batch, heads, length, total).masked_fill(later_TS, -torch.inf).view_as(scores)
    return (scores.softmax(-1) @ value_BHSD).view(batch, heads, length, width)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, _heads: int, _kv: int, dropout: float, scale: float | None, **kw: Any
) -> Tensor:
    return sdpa(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), dropout, scale, **kw)


def _cached(
    query: Tensor, key: Tensor, value: Tensor, _heads: int, _kv: int, dropout: float, scale: float | None, **kw: Any
) -> Tensor:
    return sdpa(query.transpose(1, 2), key, value, dropout, scale, **kw)


def _grow(
    key: Tensor, value: Tensor, past_key: Tensor | None, past_value: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if past_key is not None and past_value is not None:
        key, value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    return key, value, key, value


register_attention_op(PLAIN, _grow, _plain)
register_attention_op(CACHED, _grow, _cached)
