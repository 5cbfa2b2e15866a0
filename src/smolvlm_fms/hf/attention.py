"""Attention operators that let transformers' caches, and its wish to see attention weights, reach FMS's blocks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from fms.modules.attention import register_attention_op
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from smolvlm_fms.modules.attention import sdpa

__all__ = ["HF_ATTENTION", "causal_mask"]

HF_ATTENTION = "smolvlm_transformers"
"""Attention over a transformers ``Cache``: each layer's state is the pair (cache or None, layer index)."""

# A static cache of transformers 4 is told where to write; one of 5 counts by itself.
_TOLD_WHERE = "cache_kwargs" in inspect.signature(Cache.update).parameters
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


def causal_mask(
    config: Any, embeddings_BTD: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None
) -> Tensor | None:
    """The mask (B, 1, T, S), bool, that transformers' own models would use with ``cache``; None means plain causal."""
    past = cache.get_seq_length() if cache is not None else 0
    length = embeddings_BTD.shape[1]
    # transformers 4 calls the embeddings input_embeds and wants cache_position; 5 dropped both.
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": embeddings_BTD,
        "input_embeds": embeddings_BTD,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "position_ids": position_ids,
        "cache_position": torch.arange(past, past + length, device=embeddings_BTD.device),
    }
    mask: Tensor | None = create_causal_mask(**{n: v for n, v in arguments.items() if n in _MASK_ARGUMENTS})
    return mask


def _store(
    key_BTHD: Tensor, value_BTHD: Tensor, cache: Cache | None, layer: int, **kwargs: Any
) -> tuple[Tensor, Tensor, Cache | None, int]:
    key, value = key_BTHD.transpose(1, 2), value_BTHD.transpose(1, 2)
    if cache is not None and _TOLD_WHERE:
        key, value = cache.update(key, value, layer, {"cache_position": kwargs["cache_position"]})
    elif cache is not None:
        key, value = cache.update(key, value, layer)
    return key, value, cache, layer


def _compute(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv: int, dropout: float, scale: float | None, **kw: Any
) -> Tensor:
    query = query.transpose(1, 2)
    weights: list[Tensor] | None = kw.get("record_weights")
    if weights is None:
        return sdpa(query, key, value, dropout, scale, **kw)
    key, value = key.repeat_interleave(heads // kv, 1), value.repeat_interleave(heads // kv, 1)
    scores_BHTS = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    mask = kw.get("mask")
    if mask is None:
        rows, columns = scores_BHTS.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    floor = torch.finfo(scores_BHTS.dtype).min
    scores_BHTS = scores_BHTS.masked_fill(~mask, floor) if mask.dtype == torch.bool else scores_BHTS + mask
    weights.append(scores_BHTS.softmax(-1, dtype=torch.float32).to(query.dtype))
    dropped = torch.nn.functional.dropout(weights[-1], dropout, training=dropout > 0)
    return (dropped @ value).transpose(1, 2).contiguous()


register_attention_op(HF_ATTENTION, _store, _compute)
