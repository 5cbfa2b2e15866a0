"""One conversation as tensors, and several as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.errors import InputError

__all__ = ["IGNORE", "Batch", "Sample", "collate", "collate_packed", "join", "to_device"]

IGNORE = -100
"""The label of a token that is not learnt."""

Batch = dict[str, Tensor]
"""input_ids, labels, segments (B, T) int64: segments number the samples of a row from 1, and 0 is padding; position_ids
(B, T) where rows hold several packed samples; pixel_values (B, N, C, H, W) and pixel_attention_mask (B, N, H, W) where
there are pictures; for LLaVA-Next pixel_values (all tiles, C, H, W) and image_sizes (M, 2) instead."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    input_ids (T,) int64, placeholders expanded; labels (T,) int64: the token itself where it is learnt, else IGNORE;
    pixel_values (N, C, H, W) float32 as the processor gives it, or uint8; pixel_attention_mask (N, H, W) or None.
    image_sizes (M, 2) int64, for LLaVA-Next: (height, width) of the M pictures whose tiles the N are.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    pixel_attention_mask: Tensor | None = None
    name: str = ""
    image_sizes: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens, image tokens among them."""
        return self.input_ids.numel()

    @property
    def targets(self) -> int:
        """Tokens that are learnt (the first token has nothing in front to predict it from)."""
        return int((self.labels[1:] != IGNORE).sum())


def collate(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """Pad samples on the right to one batch.

    Right padding needs no mask under causal attention: no real token stands after a padding token. Missing tiles are
    zeros, which the placeholders (or the pixel mask) tell apart from black ones.
    """
    if not samples:
        raise InputError("A batch needs at least one sample.")
    length = max(sample.length for sample in samples)
    batch: Batch = {
        "input_ids": _pad([sample.input_ids for sample in samples], length, pad_token_id),
        "labels": _pad([sample.labels for sample in samples], length, IGNORE),
        "segments": _pad([torch.ones_like(sample.input_ids) for sample in samples], length, 0),
    }
    return batch | stack_pixels(samples)


def collate_packed(rows: Sequence[Sequence[Sample]], pad_token_id: int) -> Batch:
    """Join the samples of each row, and pad rows on the right. Positions start again with each sample."""
    joined = [join(row) for row in rows]
    length = max(sample.length for sample in joined)
    segments = [torch.cat([torch.full_like(s.input_ids, n) for n, s in enumerate(row, 1)]) for row in rows]
    positions = [torch.cat([torch.arange(sample.length) for sample in row]) for row in rows]
    batch = collate(joined, pad_token_id) | {"segments": _pad(segments, length, 0)}
    return batch | {"position_ids": _pad(positions, length, 0)}


def join(samples: Sequence[Sample]) -> Sample:
    """Several samples, one behind the other, as one; a sample's first token is nobody's target."""
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    masks = [
        torch.ones_like(sample.pixel_values[:, 0], dtype=torch.bool) if sample.pixel_attention_mask is None
        else sample.pixel_attention_mask.bool()
        for sample in samples if sample.pixel_values is not None
    ]  # fmt: skip
    masked = any(sample.pixel_attention_mask is not None for sample in samples)
    sizes = [sample.image_sizes for sample in samples if sample.image_sizes is not None]
    return Sample(
        torch.cat([sample.input_ids for sample in samples]),
        torch.cat([sample.labels for sample in samples]),
        torch.cat(pixels) if pixels else None,
        torch.cat(masks) if masked else None,
        image_sizes=torch.cat(sizes) if sizes else None,
    )


def stack_pixels(rows: Sequence[Sample]) -> Batch:
    """Tiles of each row, padded with zero tiles to the row that has most; empty where no row has any."""
    tiles = [sample.pixel_values for sample in rows]
    shown = [pixels for pixels in tiles if pixels is not None]
    if not shown:
        return {}
    most, shape, dtype = max(map(len, shown)), shown[0].shape[1:], shown[0].dtype
    if any(pixels.shape[1:] != shape or pixels.dtype != dtype for pixels in shown):
        kinds = sorted({f"{tuple(pixels.shape[1:])} {pixels.dtype}" for pixels in shown})
        raise InputError(f"All tiles of a batch must have one shape and dtype; {', '.join(kinds)} came.")
    sizes = [sample.image_sizes for sample in rows if sample.image_sizes is not None]
    if sizes:  # LLaVA-Next takes the pictures of all rows one after the other
        return {"pixel_values": torch.cat(shown), "image_sizes": torch.cat(sizes)}
    pixels_BNCHW = torch.zeros(len(rows), most, *shape, dtype=dtype)
    for row, pixels in enumerate(tiles):
        if pixels is not None:
            pixels_BNCHW[row, : len(pixels)] = pixels
    batch: Batch = {"pixel_values": pixels_BNCHW}
    if any(sample.pixel_attention_mask is not None for sample in rows):
        mask_BNHW = torch.zeros(len(rows), most, *shape[1:], dtype=torch.bool)
        for row, sample in enumerate(rows):
            if sample.pixel_values is not None:
                mask = sample.pixel_attention_mask
                mask_BNHW[row, : len(sample.pixel_values)] = True if mask is None else mask.bool()
        batch["pixel_attention_mask"] = mask_BNHW
    return batch


def to_device(batch: Batch, device: Any) -> Batch:
    """Move a batch; uint8 pixels become float32 between −1 and 1 (SigLIP's mean and deviation of 0.5)."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    pixels = moved.get("pixel_values")
    if pixels is not None and pixels.dtype == torch.uint8:
        moved["pixel_values"] = pixels.float().div_(127.5).sub_(1)
    return moved


def _pad(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for row, tensor in zip(padded, rows, strict=True):
        row[: tensor.numel()] = tensor
    return padded
