"""Rotary position embeddings on FMS's tables, with queries and keys in the order of channels that checkpoints have."""

from __future__ import annotations

from typing import Any

import torch
from fms.modules.positions import RotaryEmbedding
from torch import Tensor

__all__ = ["Rotary"]


class Rotary(RotaryEmbedding):  # type: ignore[misc]
    """FMS's RoPE: neighbouring channels (2i, 2i + 1) come in; the halves (i, i + D/2) of the rotated heads go out.

    FMS holds query and key weights so that the two channels that rotate together are neighbours, and leaves them so.
    A product of query and key does not care in which order its channels stand, but its rounding does: it is the only
    place where FMS's order of summation differs from transformers', and thirty layers make some 1e-4 of logits of it.
    In the checkpoint's order the products are transformers' own to the bit, and so are the keys in a cache.
    """

    def adjusted_qk(
        self,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor | None = None,
        past_kv_state: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Rotate q (B, T, H, D) and k (B, T, G, D), computed in fp32, returned in their own dtypes.

        ``position_ids`` (B, T), int64; without them, positions follow ``past_kv_state``'s keys (B, G, S, D).
        """
        if position_ids is None:
            past = past_kv_state[0].shape[2] if use_cache and past_kv_state and past_kv_state[0] is not None else 0
            position_ids = torch.arange(past, past + q.shape[1], device=q.device).expand(q.shape[0], -1)
        alpha = self.compute_freqs_cis(q.device, torch.max(position_ids[:, 0]) + q.shape[1])
        # A table of 2 × 2 rotations: cos, −sin above sin, cos.
        turns_BTC22 = self.cached_freqs[q.device.index][alpha][position_ids].float()
        cos_BT1C, sin_BT1C = turns_BTC22[..., None, :, 0, 0], turns_BTC22[..., None, :, 1, 0]
        return _rotated(q, cos_BT1C, sin_BT1C), _rotated(k, cos_BT1C, sin_BT1C)


def _rotated(x_BTHD: Tensor, cos_BT1C: Tensor, sin_BT1C: Tensor) -> Tensor:
    wide_BTHD = x_BTHD.float()
    even_BTHC, odd_BTHC = wide_BTHD[..., 0::2], wide_BTHD[..., 1::2]
    first_BTHC = even_BTHC * cos_BT1C - odd_BTHC * sin_BT1C
    second_BTHC = odd_BTHC * cos_BT1C + even_BTHC * sin_BT1C
    return torch.cat((first_BTHC, second_BTHC), -1).type_as(x_BTHD)
