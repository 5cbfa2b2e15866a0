"""Weights in the layouts of ``csrc/svk.h``: panels of 64 outputs, and the two quantisers. Pure torch, no kernels.

N outputs, K inputs, P panels, G groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvlm_fms.engine.kernels import memory

PANEL = 64  # outputs side by side
HALF_PANEL = 32  # gate outputs, then as many up outputs, in a SwiGLU panel
GROUP = 32  # inputs that share a scale
_ROWS_AT_ONCE = 4096  # rows widened to fp32 at a time while quantising: bounds the extra memory


def interleave_gate_up(weight_NK: Tensor) -> Tensor:
    """(2F, ...) with all gates before all ups -> panels of 32 gates and their 32 ups, padded with zeros."""
    gate, up = weight_NK.chunk(2)
    extra = -gate.shape[0] % HALF_PANEL
    if extra:
        padding = [0, 0] * (weight_NK.dim() - 1) + [0, extra]
        gate, up = F.pad(gate, padding), F.pad(up, padding)
    halves = [part.reshape(-1, HALF_PANEL, *part.shape[1:]) for part in (gate, up)]
    return torch.stack(halves, 1).flatten(0, 2)


def pad_to(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    """``tensor`` with zeros appended so that ``dim`` (from the end: -1 or -2) is a multiple."""
    extra = -tensor.shape[dim] % multiple
    return tensor if not extra else F.pad(tensor, [0, 0] * (-dim - 1) + [0, extra])


def _panels(rows_NW: Tensor) -> Tensor:
    """(64 P, W) -> (P, W, 64): the same word of 64 outputs side by side."""
    panels = rows_NW.view(-1, PANEL, rows_NW.shape[1]).transpose(1, 2)
    return memory.empty(tuple(panels.shape), panels.dtype).copy_(panels)


def pack_bf16(weight_NK: Tensor) -> Tensor:
    """(N, K) -> int32 (P, K/2, 64): two consecutive inputs of one output in a word."""
    padded = pad_to(pad_to(weight_NK.to(torch.bfloat16), -1, 2), -2, PANEL).contiguous()
    return _panels(padded.view(torch.int32))


def pack_int8(q_NK: Tensor, multiple: int) -> Tensor:
    """int8 (N, K) -> int32 (P, K/4, 64): four consecutive inputs as q + 128 in a word; K padded to ``multiple``."""
    padded = pad_to(pad_to(q_NK, -1, multiple), -2, PANEL).contiguous()
    words = (padded.view(torch.uint8) ^ 0x80).view(torch.int32)  # two's complement + 128
    return _panels(words)


def pack_int4(q_NK: Tensor) -> Tensor:
    """int8 (N, K) in -8...7 -> int32 (P, K/8, 64): inputs 0-3 of eight in the low nibbles, 4-7 in the high, q + 8."""
    padded = pad_to(pad_to(q_NK, -1, GROUP), -2, PANEL)
    eights = (padded + 8).to(torch.uint8).view(len(padded), -1, 2, 4)
    words = (eights[:, :, 0] | eights[:, :, 1] << 4).contiguous().flatten(1).view(torch.int32)
    return _panels(words)


def pack_group_scales(scales_NG: Tensor) -> Tensor:
    """(N, G) -> bf16 (P, G, 64)."""
    padded = pad_to(scales_NG.to(torch.bfloat16), -2, PANEL)
    return _panels(padded)


def quantize_channels(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """One scale an output: int8 (N, K) in -127...127 and fp32 scales (N,)."""
    parts = []
    for rows in torch.split(weight_NK, _ROWS_AT_ONCE):
        wide = rows.float()
        scale = wide.abs().amax(1).clamp_min(1e-30) / 127
        parts.append(((wide / scale[:, None]).round_().to(torch.int8), scale))
    return torch.cat([q for q, _ in parts]), torch.cat([s for _, s in parts])


def quantize_groups(weight_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One bf16 scale for 32 inputs: int8 (N, K) values, in -127...127 or -8...7, and bf16 scales (N, ceil(K/32)).

    Each group has the scale of least squared error among a few. 8 bits: those that take its largest magnitude to 126 …
    128, for the nearest bf16 number may clip it or waste a level. 4 bits: those that take its extreme value to between
    -8 and -5, refitted by least squares.
    """
    parts = []
    for rows in torch.split(weight_NK, _ROWS_AT_ONCE):
        groups = pad_to(rows.float(), -1, GROUP).view(len(rows), -1, GROUP)
        scale = _int8_scale(groups) if bits == 8 else _int4_scale(groups)
        low, high = (-127, 127) if bits == 8 else (-8, 7)
        q = _quantize(groups, scale.float(), low, high)
        parts.append((q.to(torch.int8).flatten(1)[:, : rows.shape[1]], scale))
    return torch.cat([q for q, _ in parts]), torch.cat([s for _, s in parts])


def _int8_scale(groups_NGK: Tensor) -> Tensor:
    largest = groups_NGK.abs().amax(2)
    return _least_error(groups_NGK, (largest / level for level in (127.0, 127.5, 128.0, 126.5, 126.0)), -127, 127)


def _int4_scale(groups_NGK: Tensor) -> Tensor:
    largest = groups_NGK.gather(2, groups_NGK.abs().argmax(2, keepdim=True)).squeeze(2)

    def fitted(level: float) -> Tensor:
        q = _quantize(groups_NGK, largest / level, -8, 7)
        return (q * groups_NGK).sum(2) / (q * q).sum(2).clamp_min(1)

    return _least_error(groups_NGK, map(fitted, (-8.0, -7.5, -7.0, -6.5, -6.0, -5.5, -5.0)), -8, 7)


def _least_error(groups_NGK: Tensor, candidates: Iterable[Tensor], low: int, high: int) -> Tensor:
    """For each group (N, G) the bf16 scale among ``candidates`` (each (N, G)) with the least squared error."""
    best = torch.zeros(groups_NGK.shape[:2], dtype=torch.bfloat16)
    best_error = torch.full(best.shape, torch.inf)
    for candidate in candidates:
        scale = candidate.to(torch.bfloat16)
        wide = scale.float()
        q = _quantize(groups_NGK, wide, low, high)
        error = (q.mul_(wide[..., None]).sub_(groups_NGK)).square_().sum(2)
        better = ~(error >= best_error)  # also where it is not a number: such weights must not turn into zeros
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _quantize(groups_NGK: Tensor, scale_NG: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale_NG == 0, 0.0, 1.0 / scale_NG)
    return (groups_NGK * inverse[..., None]).round_().clamp_(low, high)
