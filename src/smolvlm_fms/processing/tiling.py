"""The steps between a picture and the model's input, each usable by itself.

    resize ▸ centre crop (optional) ▸ resize to the canvas ▸ cut into tiles ▸ rescale and normalise ▸ (cut into patches)

The image processor runs exactly these functions. Arrays are height × width × channels until the last step, which writes
channels × height × width straight into the batch: no picture and no tile is ever copied as floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from smolvlm_fms.errors import ConfigurationError, InputError
from smolvlm_fms.processing import native
from smolvlm_fms.processing.geometry import center_crop_box, resize_to_longest_edge, tile_boxes
from smolvlm_fms.processing.pixels import Picture, to_picture
from smolvlm_fms.processing.resample import Backend, Pixels, as_array, prepare, resize
from smolvlm_fms.processing.sources import ImageSource, load_image
from smolvlm_fms.processing.threads import in_threads
from smolvlm_fms.types import TileGrid

__all__ = [
    "ByteTiles",
    "PixelMap",
    "center_crop",
    "cut_into_patches",
    "cut_picture",
    "in_threads",
    "normalize",
    "resize_keep_aspect",
    "split_into_tiles",
]

Array: TypeAlias = npt.NDArray[Any]
Float32: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PixelMap:
    """Rescaling and normalising, as the few float32 operations that give transformers' own values to the last bit."""

    steps: tuple[tuple[np.ufunc, Float32], ...]
    table: Float32 | None = None

    @classmethod
    def build(
        cls,
        backend: Backend,
        *,
        rescale_factor: float | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        floats_to_one: bool = False,
    ) -> PixelMap:
        """For one call's options; ``floats_to_one``: the pixels were floats in 0…1, so they are already rescaled.

        transformers rescales such pixels a second time; here they come out as the same picture in bytes would.
        """
        steps: list[tuple[np.ufunc, Float32]] = []
        table = None
        if backend != "pil":
            if floats_to_one and rescale_factor is not None:
                steps.append((np.multiply, _per_channel([255.0])))
            if mean is not None and std is not None:
                # The mean and the deviation are scaled up instead of the pixels down: one operation fewer.
                up = 1.0 if rescale_factor is None else 1.0 / rescale_factor
                steps += [(np.subtract, _per_channel(mean) * up), (np.divide, _per_channel(std) * up)]
            elif rescale_factor is not None:
                steps.append((np.multiply, _per_channel([rescale_factor])))
            return cls(tuple(steps))
        if floats_to_one and rescale_factor is None:
            rescale_factor = 1 / 255
        if rescale_factor is not None:
            exact = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
            divisor = np.float32(1.0 / rescale_factor)
            if np.array_equal(np.arange(256, dtype=np.float32) / divisor, exact):
                steps.append((np.divide, _per_channel([float(divisor)])))
            else:
                table = exact
        if mean is not None and std is not None:
            steps += [(np.subtract, _per_channel(mean)), (np.divide, _per_channel(std))]
        return cls(tuple(steps), table)

    def write(self, tile_HWC: Array, out_CHW: Array) -> None:
        """Map one tile into its place in the batch."""
        if out_CHW.dtype == np.float32 and native.can_write(tile_HWC):
            native.write(tile_HWC, out_CHW, self._tables(tile_HWC.shape[2]))
        else:
            self._write(tile_HWC, out_CHW)

    def write_planes(self, tile_CHW: Array, out_CHW: Array) -> None:
        """The same for a tile whose channels come first already."""
        planes = [plane.reshape(*plane.shape, 1) for plane in tile_CHW]
        if native.can_write(planes[0]):
            for channel, table in enumerate(self._tables(len(planes))):
                native.write(planes[channel], out_CHW[channel : channel + 1], table[None])
        else:
            self._write(tile_CHW.transpose(1, 2, 0), out_CHW)

    def _tables(self, channels: int) -> Float32:
        """What becomes of each of the 256 bytes, by channel."""
        tables = np.empty((channels, 1, 256), np.float32)
        self._write(np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, channels)), tables)
        return tables[:, 0]

    def _write(self, tile_HWC: Array, out_CHW: Array) -> None:
        source = tile_HWC.transpose(2, 0, 1)
        if self.table is not None:
            np.take(self.table, source, out=out_CHW, mode="clip")
        else:
            np.copyto(out_CHW, source, casting="unsafe")
        for operation, value in self.steps:
            operation(out_CHW, value, out=out_CHW)

    @property
    def is_identity(self) -> bool:
        return not self.steps and self.table is None


class ByteTiles:
    """Tiles as bytes (N, C, H, W), a quarter of the memory; a slice of them is the model's floats."""

    def __init__(self, bytes_NCHW: torch.Tensor, pixel_map: PixelMap) -> None:
        self.bytes_NCHW = bytes_NCHW
        self.pixel_map = pixel_map

    def __len__(self) -> int:
        return len(self.bytes_NCHW)

    @property
    def nbytes(self) -> int:
        return self.bytes_NCHW.nbytes

    def __getitem__(self, part: slice) -> torch.Tensor:
        """(N, C, H, W) float32."""
        tiles = self.bytes_NCHW[part].numpy()
        out = np.empty(tiles.shape, np.float32)
        for tile, place in zip(tiles, out, strict=True):
            self.pixel_map.write_planes(tile, place)
        return torch.from_numpy(out)


def cut_picture(
    pixels: Pixels, grid: TileGrid, resample: Image.Resampling, backend: Backend, threads: int = 1
) -> list[Array]:
    """The tiles of one picture, (tile, tile, channels) each, row by row, the overview last; views where possible."""
    pixels = resize(pixels, grid.resized, resample, backend, threads)
    if grid.cropped != grid.resized:
        pixels = _crop(as_array(pixels), grid.cropped)
    pixels = resize(pixels, grid.canvas, resample, backend, threads)
    canvas = as_array(pixels)
    if not grid.rows:
        return [canvas]
    overview = as_array(resize(canvas, (grid.tile, grid.tile), resample, backend, threads))
    return [*(canvas[top:bottom, left:right] for top, left, bottom, right in tile_boxes(grid)), overview]


def resize_keep_aspect(
    image: ImageSource,
    longest_edge: int,
    *,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    backend: Backend = "pil",
) -> Array:
    """Any picture with its longest edge at ``longest_edge``: (height, width, 3), uint8 (floats for float tensors).

    This is stage one of the processor's resize; the shorter side is even.
    """
    picture = to_picture(load_image(image))
    size = resize_to_longest_edge(*picture.size, longest_edge)
    return as_array(resize(prepare(picture, backend), size, resample, backend))


def center_crop(image: ImageSource, size: tuple[int, int]) -> Array:
    """The middle (height, width) = ``size`` of any picture, black where the picture is smaller: (height, width, 3)."""
    return _crop(as_array(to_picture(load_image(image)).pixels), size)


def normalize(
    pixels_HWC: Array,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    *,
    rescale_factor: float | None = 1 / 255,
) -> torch.Tensor:
    """``(pixels · rescale_factor − mean) / std`` as a float32 tensor of (channels, height, width)."""
    picture: Picture = to_picture(pixels_HWC, rgb=False, order="channels_last")
    pixels = as_array(prepare(picture, "pil"))
    out = np.empty((pixels.shape[2], *pixels.shape[:2]), np.float32)
    check_channels(pixels.shape[2], mean, std)
    PixelMap.build("pil", rescale_factor=rescale_factor, mean=mean, std=std, floats_to_one=picture.unit).write(
        pixels, out
    )
    return torch.from_numpy(out)


def split_into_tiles(canvas_HWC: Array, tile: int) -> list[Array]:
    """Views of ``tile`` × ``tile`` pixels, row by row. Both sides of the canvas must be whole tiles."""
    height, width = canvas_HWC.shape[:2]
    if height % tile or width % tile:
        raise InputError(f"A canvas of {width}×{height} pixels is not made of whole tiles of {tile}; resize it first.")
    return [
        canvas_HWC[top : top + tile, left : left + tile]
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]


def cut_into_patches(pixels_NCHW: torch.Tensor, patch: int) -> torch.Tensor:
    """Tiles (N, C, H, W) as patches (N, P, C·patch·patch), row by row: what a patch embedding multiplies.

    The values of a patch are ordered channels, rows, columns, like the flattened weight of a convolution.
    """
    if pixels_NCHW.ndim != 4 or pixels_NCHW.shape[2] % patch or pixels_NCHW.shape[3] % patch:
        raise InputError(
            f"Tiles of shape {tuple(pixels_NCHW.shape)} cannot be cut into patches of {patch}; pass (N, C, H, W) "
            "with H and W divisible by the patch."
        )
    tiles, channels = pixels_NCHW.shape[:2]
    patches = pixels_NCHW.unfold(2, patch, patch).unfold(3, patch, patch)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(tiles, -1, channels * patch * patch)


def check_channels(channels: int, *values: Iterable[float] | None) -> None:
    """Means and deviations must be one number, or one for each channel."""
    for each in values:
        if each is not None and len(list(each)) not in (1, channels):
            raise ConfigurationError(f"A picture of {channels} channels cannot take the mean or deviation {each}.")


def _crop(pixels_HWC: Array, size: tuple[int, int]) -> Array:
    height, width, channels = pixels_HWC.shape
    top, left, bottom, right = center_crop_box(height, width, *size)
    inside = pixels_HWC[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    if inside.shape[:2] == size:
        return inside
    padded = np.zeros((*size, channels), pixels_HWC.dtype)
    y, x = max(-top, 0), max(-left, 0)
    padded[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return padded


def _per_channel(values: Sequence[float]) -> Float32:
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1)
