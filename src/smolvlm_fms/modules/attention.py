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
    if mask is not None:
        mask = mask if mask.dim() == 4 else mask[:, None]
        mask = mask.to(query_BHTD.dtype) if mask.is_floating_point() else mask
    out_BHTD = F.scaled_dot_product_attention(
        query_BHTD,
        key_BHSD,
        value_BHSD,
        attn_mask=mask,
        dropout_p=p_dropout,
        is_causal=mask is None and bool(kwargs.get("is_causal_mask", False)),
        scale=scale,
        enable_gqa=query_BHTD.shape[1] != key_BHSD.shape[1],
    )
    return out_BHTD.transpose(1, 2).contiguous()


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
