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
from smolvlm_fms.processing.pixels import Picture

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
        return _resize_torch(as_array(pixels), size, resample, in_floats=backend == "torch4")
    if isinstance(pixels, Image.Image) and pixels.size == (size[1], size[0]):
        return pixels
    channels = len(pixels.getbands()) if isinstance(pixels, Image.Image) else pixels.shape[2]
    if native.can_resize(channels, resample):
        return native.resize(as_array(pixels), size, resample, threads)
    image = as_image(pixels)
    return image if image.size == (size[1], size[0]) else image.resize((size[1], size[0]), resample)


def as_array(pixels: Pixels) -> Array:
    """Height × width × channels; a greyscale image has one channel."""
    if not isinstance(pixels, Image.Image):
        return pixels
    array = np.asarray(pixels)
    return array[..., None] if array.ndim == 2 else array


def as_image(pixels: Pixels) -> Image.Image:
    if isinstance(pixels, Image.Image):
        return pixels
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(flat))


def _resize_torch(pixels_HWC: Array, size: tuple[int, int], resample: Image.Resampling, in_floats: bool) -> Array:
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    mode = _torch_mode(resample)
    if in_floats and mode == "lanczos":
        mode = "bicubic"
    image = torch.from_numpy(_writable_view(np.ascontiguousarray(pixels_HWC))).permute(2, 0, 1)[None]
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
