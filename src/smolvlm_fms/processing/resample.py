"""Resizing, by back ends that agree with transformers' image processors.

``pil``    Pillow's own arithmetic: 8 bits in, 8 bits out, one rounding after each of the two passes.
``torch``  torch's antialiased interpolation, which is what torchvision calls for tensors. On 8-bit pixels its weights
           have fewer bits than Pillow's, so a few pixels in a thousand differ by a level or two.
``torch4`` the tensor back end of transformers 4: bicubic in place of Lanczos, in floats, rounded once a resize.

All work on pixels as height × width × channels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.processing import native
from smolvlm_fms.processing.pixels import Picture, rows_of, shape_of
from smolvlm_fms.processing.threads import bands, in_threads

__all__ = ["Backend", "Pixels", "as_array", "prepare", "resize"]

Array: TypeAlias = npt.NDArray[Any]
Backend: TypeAlias = Literal["pil", "torch", "torch4"]
Pixels: TypeAlias = "Image.Image | Array"

_TORCH_MODES = {
    Image.Resampling.NEAREST: "nearest-exact",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.LANCZOS: "lanczos",
}


def prepare(picture: Picture, backend: Backend) -> Pixels:
    """What :func:`resize` takes: for ``pil`` always 8-bit, for tensors an array, uint8 or float32."""
    pixels = picture.pixels
    if isinstance(pixels, Image.Image) or pixels.dtype == np.uint8:
        return pixels
    if backend != "pil":
        return pixels.astype(np.float32, copy=False)
    if not picture.unit:
        return np.rint(pixels).astype(np.uint8)
    # Through float32 and truncated, not rounded: transformers' way from 0…1 to bytes, which decides single levels.
    return (pixels.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)


def resize(
    pixels: Pixels, size: tuple[int, int], resample: Image.Resampling, backend: Backend, threads: int = 1
) -> Pixels:
    """``pixels`` at (height, width) = ``size``, as an array or a Pillow image, whichever was at hand."""
    if backend != "pil":
        return _resize_torch(pixels, size, resample, in_floats=backend == "torch4", threads=threads)
    if isinstance(pixels, Image.Image) and pixels.size == (size[1], size[0]):
        return pixels
    if native.can_resize(shape_of(pixels)[2], resample):
        return native.resize(pixels, size, resample, threads)
    image = as_image(pixels)
    return image if image.size == (size[1], size[0]) else image.resize((size[1], size[0]), resample)


def as_array(pixels: Pixels) -> Array:
    """Height × width × channels; a greyscale image has one channel."""
    return rows_of(pixels, 0, pixels.height) if isinstance(pixels, Image.Image) else pixels


def as_image(pixels: Pixels) -> Image.Image:
    if isinstance(pixels, Image.Image):
        return pixels
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(flat))


def _resize_torch(
    pixels: Pixels, size: tuple[int, int], resample: Image.Resampling, in_floats: bool, threads: int
) -> Array:
    height, width, _ = shape_of(pixels)
    if (height, width) == size:
        return as_array(pixels)
    mode = _torch_mode(resample)
    if in_floats and mode == "lanczos":
        mode = "bicubic"
    integral = isinstance(pixels, Image.Image) or pixels.dtype == np.uint8
    if threads > 1 and integral and not in_floats and width != size[1] and _splits(mode):
        pixels = _across(pixels, size[1], mode, threads)
    return _interpolate(as_array(pixels), size, mode, in_floats)


def _across(pixels: Pixels, target: int, mode: str, threads: int) -> Array:
    """torch's pass over the widths, on all threads and without the whole picture as an array."""
    height, _, channels = shape_of(pixels)
    out = np.empty((height, target, channels), np.uint8)

    def work(rows: tuple[int, int]) -> None:
        out[rows[0] : rows[1]] = _interpolate(rows_of(pixels, *rows), (rows[1] - rows[0], target), mode)

    in_threads(work, bands(height, threads, most=512), threads)  # fewer rows: torch makes its weights anew for each
    return out


@functools.cache
def _splits(mode: str) -> bool:
    """Whether the torch that is here gives the same bytes when widths come first, a band of rows at a time."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    sizes = ((50, 70), (20, 18), (20, 60), (60, 18), (12, 34), (40, 30))
    split = [_interpolate(_across(pixels, size[1], mode, 2), size, mode) for size in sizes]
    return all(np.array_equal(a, _interpolate(pixels, size, mode)) for a, size in zip(split, sizes, strict=True))


def _interpolate(pixels_HWC: Array, size: tuple[int, int], mode: str, in_floats: bool = False) -> Array:
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    # A batch of one before the axes are turned: with other strides torch would not see that channels come last, and
    # take three times as long.
    image = torch.from_numpy(_writable_view(np.ascontiguousarray(pixels_HWC)))[None].permute(0, 3, 1, 2)
    integral = image.dtype == torch.uint8
    if integral and (in_floats or (mode == "bilinear" and not _has_8bit_bilinear())):
        image = image.float()
    smooth = mode != "nearest-exact"
    resized = torch.nn.functional.interpolate(
        image, size=list(size), mode=mode, antialias=smooth, align_corners=False if smooth else None
    )
    if integral and resized.dtype != torch.uint8:
        resized = resized.clamp_(0, 255).round_().to(torch.uint8)
    return resized[0].permute(1, 2, 0).numpy()


class _Unlocked:
    """Shows an array's memory as writable, and keeps the array alive."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def _writable_view(array: Array) -> Array:
    """torch warns of read-only memory (Pillow's) even where nothing is going to be written; a copy would cost 36 MB."""
    return array if array.flags.writeable else np.asarray(_Unlocked(array))


def _torch_mode(resample: Image.Resampling) -> str:
    mode = _TORCH_MODES.get(resample)
    if mode is None:
        raise ConfigurationError(
            f"resample={resample.name} has no counterpart on tensors; choose backend='pil', or one of "
            f"{', '.join(each.name for each in _TORCH_MODES)}."
        )
    return "bicubic" if mode == "lanczos" and not _has_lanczos() else mode


@functools.cache
def _has_lanczos() -> bool:
    """Older torch has no Lanczos; transformers then takes bicubic in its place, and so do we, saying so once."""
    try:
        torch.nn.functional.interpolate(
            torch.zeros(1, 3, 2, 2, dtype=torch.uint8), size=[3, 3], mode="lanczos", antialias=True, align_corners=False
        )
    except (NotImplementedError, ValueError, RuntimeError):
        warnings.warn(
            "This torch has no Lanczos resampling; backend='torch' takes bicubic in its place. Use backend='pil' for "
            "exact pixels.",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _has_8bit_bilinear() -> bool:
    """Where torchvision takes the 8-bit kernel for bilinear: on processors with AVX2."""
    capability: Callable[[], str] = torch.backends.cpu.get_cpu_capability
    return "AVX2" in capability() or "AVX512" in capability()
