"""The way from embeddings to logits, the same for every family here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smolvlm_fms.model.masks import attention_arguments, text_positions
from smolvlm_fms.modules.text import KVCache, TextModel

__all__ = ["decode"]


def decode(
    text_model: TextModel,
    inputs: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value_states: KVCache | None = None,
    use_cache: bool = False,
    last_n_tokens: int = 0,
    output_hidden_states: bool = False,
    logits_mask: Tensor | None = None,
    **attn_kwargs: Any,
) -> Any:
    """Run ``inputs`` (embeddings (B, T, D) or ids (B, T)) through the text model; arguments as in ``forward``.

    Returns logits (B, T, V); with ``use_cache`` (logits, cache); with ``output_hidden_states`` the L + 1 hidden states
    come last in the tuple. A ``mask`` or an ``attn_name`` among ``attn_kwargs`` replaces the mask made here.
    """
    batch, length = inputs.shape[:2]
    past = past_key_value_states[0][0].shape[2] if past_key_value_states else 0
    if attn_kwargs.get("mask") is None and "attn_name" not in attn_kwargs:
        attn_kwargs.pop("mask", None)
        attn_kwargs |= attention_arguments(attention_mask, length, past, inputs.device)
    if position_ids is None:
        position_ids = text_positions(attention_mask, batch, length, past, inputs.device)
    hidden_BTD, cache, states = text_model.base_model(
        inputs,
        position_ids=position_ids,
        past_key_value_states=past_key_value_states,
        use_cache=use_cache,
        output_hidden_states=output_hidden_states,
        **attn_kwargs,
    )
    if last_n_tokens:
        hidden_BTD = hidden_BTD[:, -last_n_tokens:]
    elif logits_mask is not None:
        hidden_BTD = hidden_BTD[logits_mask]
    results: tuple[Any, ...] = (text_model.logits(hidden_BTD),)
    if use_cache:
        results += (cache,)
    if output_hidden_states:
        results += (states,)
    return results if len(results) > 1 else results[0]
