"""Sizes, tile grids and token counts: integers in, integers out; no torch, no Pillow.

Everything that needs to know how a picture is cut asks :func:`plan_tiles`: the image processor for pixels, the prompt
for ``rows`` and ``cols``, the command line for costs. Nothing else in this package computes a grid.

    source (h, w)
      │  stage one: the longest edge to its target, the other side cut to an integer and made even; never above 4096
      ▼
    resized (h, w)
      │  optional centre crop
      │  stage two: both sides up to whole tiles
      ▼
    canvas (h, w)  ──▶ rows × cols tiles, row by row, then the canvas shrunk to one tile: the overview, always last

A canvas of a single tile is not cut: it is the overview alone, with rows = cols = 0. The stages and their rounding are
those of Idefics3 (transformers' ``Idefics3ImageProcessor`` and ``SmolVLMImageProcessor``), to the integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

from smolvlm_fms.errors import ImageError, InputError
from smolvlm_fms.types import TileGrid

__all__ = [
    "MAX_CANVAS_PIXELS",
    "MAX_EDGE",
    "Detail",
    "Size",
    "center_crop_box",
    "fit_to_tiles",
    "image_token_count",
    "plan_tiles",
    "resize_to_longest_edge",
    "tile_boxes",
    "tile_count",
    "tokens_per_tile",
]

#: No side is ever resized above this in stage one (Idefics3's own cap).
MAX_EDGE = 4096
#: A canvas above this is refused: only ``do_resize=False`` gets there. Pillow's own limit for decompression bombs.
MAX_CANVAS_PIXELS = 178_956_970

#: ``high`` is what the checkpoints were trained on; ``low`` is one tile; ``auto`` never blows a picture up by a tile.
Detail: TypeAlias = Literal["low", "auto", "high"]
#: A target: the longest edge, or exactly (height, width), or None for "leave the size alone".
Size: TypeAlias = int | tuple[int, int] | None


def resize_to_longest_edge(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """Stage one: (height, width) whose longest side is ``longest_edge`` (at most 4096), the aspect ratio kept.

    The other side is truncated, then made even by adding one, then at least 1. The cap comes second and does not make
    sides even again. The quotients are taken in floating point because that is what decides the last pixel in the
    original.
    """
    _check_positive(height=height, width=width, longest_edge=longest_edge)
    aspect = width / height
    if width >= height:
        width = longest_edge
        height = _even(int(width / aspect))
    else:
        height = longest_edge
        width = _even(int(height * aspect))
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > MAX_EDGE:
        aspect = width / height
        if width >= height:
            height, width = int(MAX_EDGE / aspect), MAX_EDGE
        else:
            height, width = MAX_EDGE, int(MAX_EDGE * aspect)
    return max(height, 1), max(width, 1)


def fit_to_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Stage two: the canvas (height, width), both multiples of ``tile`` and no smaller than one tile.

    The longer side goes up to whole tiles first and takes the other with it, which then goes up in its turn.
    """
    _check_positive(height=height, width=width, tile=tile)
    aspect = width / height
    if width >= height:
        width = _whole_tiles(width, tile)
        height = _whole_tiles(int(width / aspect), tile)
    else:
        height = _whole_tiles(height, tile)
        width = _whole_tiles(int(height * aspect), tile)
    return max(height, tile), max(width, tile)


def plan_tiles(
    height: int,
    width: int,
    *,
    size: Size,
    tile: int,
    split: bool = True,
    crop: tuple[int, int] | None = None,
    detail: Detail = "high",
) -> TileGrid:
    """How a picture of ``height`` × ``width`` pixels is resized and cut.

    Args:
        height, width: of the picture, upright, in pixels.
        size: the longest edge after stage one, or exactly (height, width), or None to leave the picture's own size.
        tile: side of a tile in pixels (``max_image_size`` of the checkpoint).
        split: whether to cut at all; without it, every picture becomes one tile.
        crop: (height, width) of a centre crop after stage one, or None.
        detail: ``"low"`` never cuts, ``"auto"`` lowers the longest edge to the tiles that the picture itself fills.

    Raises:
        ImageError: the canvas would be larger than :data:`MAX_CANVAS_PIXELS` (possible only without stage one).
    """
    _check_positive(height=height, width=width, tile=tile)
    if detail not in get_args(Detail):
        raise InputError(f"detail is {detail!r}; it is one of 'low', 'auto' and 'high'.")
    if isinstance(size, int):
        if detail == "auto":
            size = min(size, _whole_tiles(max(height, width), tile))
        resized = resize_to_longest_edge(height, width, size)
    else:
        resized = (height, width) if size is None else size
        _check_positive(height=resized[0], width=resized[1])
    cropped = crop if crop is not None else resized
    canvas = fit_to_tiles(*cropped, tile) if split and detail != "low" else (tile, tile)
    if canvas[0] * canvas[1] > MAX_CANVAS_PIXELS:
        raise ImageError(
            f"A picture of {width}×{height} pixels would be cut from a canvas of {canvas[1]}×{canvas[0]}, more than "
            f"{MAX_CANVAS_PIXELS:,} pixels. Leave do_resize on, or make the picture smaller."
        )
    rows, cols = canvas[0] // tile, canvas[1] // tile
    if rows * cols == 1:
        rows = cols = 0
    return TileGrid(
        source=(height, width),
        resized=resized,
        cropped=cropped,
        canvas=canvas,
        tile=tile,
        rows=rows,
        cols=cols,
        count=tile_count(rows, cols),
    )


def tile_count(rows: int, cols: int) -> int:
    """Tiles that a picture of ``rows`` × ``cols`` brings to the model, the overview included (1 when it is not cut)."""
    if (rows == 0) != (cols == 0) or rows < 0 or cols < 0:
        raise InputError(f"A grid of {rows} rows and {cols} columns does not exist; an uncut picture has 0 and 0.")
    return rows * cols + 1


def tokens_per_tile(image_size: int, patch_size: int, scale_factor: int) -> int:
    """``<image>`` tokens of one tile: the patches of a tile, ``scale_factor`` squared of them in each token.

    256M: (512 // 16)² / 4² = 64. Idefics3-8B: (364 // 14)² / 2² = 169.
    """
    _check_positive(image_size=image_size, patch_size=patch_size, scale_factor=scale_factor)
    side = image_size // patch_size
    if side == 0 or side % scale_factor:
        raise InputError(
            f"A tile of {image_size} pixels has {side}×{side} patches of {patch_size}; the scale factor {scale_factor} "
            "does not divide them."
        )
    return (side // scale_factor) ** 2


def image_token_count(rows: int, cols: int, per_tile: int) -> int:
    """``<image>`` tokens of a whole picture; the words that frame its tiles are not counted."""
    _check_positive(per_tile=per_tile)
    return tile_count(rows, cols) * per_tile


def tile_boxes(grid: TileGrid) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of each tile on the canvas, row by row; nothing for an uncut picture."""
    for row in range(grid.rows):
        for col in range(grid.cols):
            top, left = row * grid.tile, col * grid.tile
            yield top, left, top + grid.tile, left + grid.tile


def center_crop_box(height: int, width: int, crop_height: int, crop_width: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a centre crop; coordinates outside the picture stand for black padding.

    Where the crop is larger than the picture, the odd pixel of padding goes to the bottom or the right; where it is
    smaller, the odd pixel is cut there. Both as in the ``center_crop`` of transformers' tensor back end.
    """
    _check_positive(height=height, width=width, crop_height=crop_height, crop_width=crop_width)
    top = (height - crop_height) // 2 if crop_height <= height else -((crop_height - height) // 2)
    left = (width - crop_width) // 2 if crop_width <= width else -((crop_width - width) // 2)
    return top, left, top + crop_height, left + crop_width


def _even(side: int) -> int:
    return side + side % 2


def _whole_tiles(side: int, tile: int) -> int:
    return -(-side // tile) * tile


def _check_positive(**sides: int) -> None:
    for name, value in sides.items():
        if value < 1:
            raise ImageError(f"{name} is {value}; a picture and its tiles are at least one pixel on each side.")
