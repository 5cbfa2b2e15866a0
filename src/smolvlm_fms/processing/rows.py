"""Batches that hold videos beside pictures, or several videos in one text: one row of pixels for each text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.processing.prompt import PlaceholderTokens

__all__ = ["lay_out_rows", "placeholder_kinds"]


def placeholder_kinds(text: str, tokens: PlaceholderTokens) -> list[str]:
    """``"image"`` and ``"video"`` in the order in which their placeholders stand in a text."""
    pattern = re.compile(f"(?P<image>{re.escape(tokens.image)})|(?P<video>{re.escape(tokens.video)})")
    return [str(match.lastgroup) for match in pattern.finditer(text)]


def lay_out_rows(
    kinds: Sequence[Sequence[str]],
    pictures: Mapping[str, Any] | None,
    tiles: Sequence[int],
    clips: Mapping[str, Any],
    frames: Sequence[int],
    return_tensors: str | None,
) -> dict[str, Any]:
    """``pixel_values`` (B, N, C, tile, tile) and ``pixel_attention_mask`` (B, N, tile, tile), row b for text b.

    kinds: of each text's placeholders, in order; pictures: the picture processor's batch, one row a text, or None;
    tiles: of each picture in the batch; clips: the video processor's batch, one row a video; frames: of each video.
    Missing tiles are zero, and so is their mask.

    Raises ConfigurationError where tiles and frames differ in size.
    """
    picture_rows = [] if pictures is None else [_tensor(row) for row in pictures["pixel_values"]]
    next_clip, next_count = iter(zip(clips["pixel_values"], frames, strict=True)), iter(tiles)
    rows: list[list[torch.Tensor]] = []
    for row, placeholders in enumerate(kinds):
        pieces, taken = [], 0
        for kind in placeholders:
            if kind == "video":
                clip, length = next(next_clip)
                pieces.append(_tensor(clip)[:length])
            else:
                count = next(next_count)
                pieces.append(picture_rows[row][taken : taken + count])
                taken += count
        rows.append(pieces)
    shapes = {tuple(piece.shape[1:]) for pieces in rows for piece in pieces}
    if len(shapes) != 1:
        raise ConfigurationError(
            f"Pictures and videos of one batch must become tiles of one size, got {sorted(shapes)}; give both "
            f"processors the same max_image_size."
        )
    counts = torch.tensor([sum(len(piece) for piece in pieces) for pieces in rows])
    shape = shapes.pop()
    pixels = torch.zeros(len(rows), int(counts.max()), *shape, dtype=_dtype(rows))
    for row, pieces in enumerate(rows):
        if pieces:
            torch.cat(pieces, out=pixels[row, : counts[row]])
    present = (torch.arange(pixels.shape[1])[None] < counts[:, None]).long()
    mask = present[..., None, None].expand(-1, -1, *shape[1:])
    if return_tensors == "np":
        return {"pixel_values": pixels.numpy(), "pixel_attention_mask": mask.numpy()}
    if return_tensors is None:
        return {"pixel_values": list(pixels), "pixel_attention_mask": list(mask)}
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _dtype(rows: Sequence[Sequence[torch.Tensor]]) -> torch.dtype:
    return next(piece.dtype for pieces in rows for piece in pieces)


def _tensor(values: Any) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, list | tuple):
        return torch.stack([_tensor(value) for value in values])
    return torch.from_numpy(np.ascontiguousarray(values))
