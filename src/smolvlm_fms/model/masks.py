"""Positions and attention masks of the text backbone, for left- or right-padded batches, with or without a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.errors import InputError

__all__ = ["attention_arguments", "grown_mask", "text_positions"]


def text_positions(attention_mask_BS: Tensor | None, batch: int, length: int, past: int, device: Any) -> Tensor:
    """Positions (B, T), int64, of the last ``length`` tokens; padding does not count, wherever it stands."""
    if attention_mask_BS is None:
        return torch.arange(past, past + length, device=device).expand(batch, length)
    positions_BS = attention_mask_BS.long().cumsum(1) - 1
    return positions_BS.clamp(min=0)[:, -length:]


def attention_arguments(attention_mask_BS: Tensor | None, length: int, past: int, device: Any) -> dict[str, Any]:
    """The arguments that FMS's attention needs for ``length`` new tokens after ``past`` cached ones.

    ``attention_mask_BS`` (B, past + length) is 1 for real tokens. The mask given on is (B, T, S), bool; none is given
    where plain causal attention says the same, because that is the fast path of scaled dot-product attention.
    """
    total = past + length
    if attention_mask_BS is not None:
        if attention_mask_BS.dim() != 2 or attention_mask_BS.shape[1] != total:
            raise InputError(
                f"attention_mask must be (batch, {total}): {past} cached and {length} new tokens; "
                f"{tuple(attention_mask_BS.shape)} came."
            )
        if not torch.compiler.is_compiling() and bool(attention_mask_BS.all()):
            attention_mask_BS = None
    if attention_mask_BS is None and (past == 0 or length == 1):
        if length > 1:  # a branch, not the comparison: compiled with dynamic shapes that would be no plain bool
            return {"is_causal_mask": True}
        return {"is_causal_mask": False}
    query_T1 = torch.arange(past, total, device=device)[:, None]
    key_S = torch.arange(total, device=device)
    causal_TS = key_S <= query_T1
    if attention_mask_BS is None:
        return {"mask": causal_TS[None], "is_causal_mask": False}
    # A padding query would see nothing and its softmax would be 0/0; it sees itself instead, and nobody reads it.
    mask_BTS = (causal_TS & attention_mask_BS.bool()[:, None, :]) | (key_S == query_T1)
    return {"mask": mask_BTS, "is_causal_mask": False}


def grown_mask(attention_mask_BS: Tensor | None, total: int) -> Tensor | None:
    """The mask with ones appended for tokens generated since, up to ``total`` columns."""
    if attention_mask_BS is None or attention_mask_BS.shape[1] >= total:
        return attention_mask_BS
    return torch.nn.functional.pad(attention_mask_BS, (0, total - attention_mask_BS.shape[1]), value=1)
