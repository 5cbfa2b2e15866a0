"""Attention over packed rows, one sample after the other: no work for pairs that must not see each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from fms.modules.attention import register_attention_op
from torch import Tensor

from smolvlm_fms.modules.attention import sdpa

__all__ = ["PACKED", "cuts"]

PACKED = "smolvlm_packed"
"""FMS attention operator for packed rows; takes ``cuts`` among the attention arguments."""


def cuts(segments_BT: Tensor) -> list[list[tuple[int, int]]]:
    """(start, end) of every sample of every row; padding, segment 0, is a sample of its own."""
    rows = []
    for row in segments_BT.cpu():
        edges = [0, *((row[1:] != row[:-1]).nonzero().flatten() + 1).tolist(), len(row)]
        rows.append([(a, b) for a, b in pairwise(edges) if b > a])
    return rows


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _heads: int,
    _kv: int,
    dropout: float,
    scale: float | None,
    **kw: Any,
) -> Tensor:
    """Causal attention within each sample; queries, keys, values and result are (B, T, H, D)."""
    rows = []
    for number, spans in enumerate(kw["cuts"]):
        parts = []
        for start, end in spans:
            q, k, v = (x[number : number + 1, start:end].transpose(1, 2) for x in (query, key, value))
            parts.append(sdpa(q, k, v, dropout, scale, is_causal_mask=True))
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def _keep(key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return key, value, key, value


register_attention_op(PACKED, _keep, _attend)
