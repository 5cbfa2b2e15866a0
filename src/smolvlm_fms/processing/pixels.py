"""From any loaded picture to plain pixels: height × width × channels, 8-bit, or floats where the caller gave floats.

Colours become RGB, transparency is laid on white, 16-bit and 1-bit values are spread over 0…255. Arrays must say which
axis holds the channels, or make it evident: a guess here would turn colours into rows without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from smolvlm_fms.errors import ImageError
from smolvlm_fms.processing.sources import MAX_PIXELS, LoadedImage

__all__ = ["ChannelOrder", "Picture", "rows_of", "shape_of", "to_picture"]

Array: TypeAlias = npt.NDArray[Any]
ChannelOrder: TypeAlias = Literal["channels_first", "channels_last", "none"]
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, slots=True)
class Picture:
    """One upright picture, before resizing.

    ``pixels`` is a Pillow image (modes L, RGB, RGBA), or an array of height × width × channels, uint8, float32 or
    float64. ``unit`` says that floats run from 0 to 1, not to 255.
    """

    pixels: Image.Image | Array
    unit: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return shape_of(self.pixels)[:2]

    @property
    def channels(self) -> int:
        return shape_of(self.pixels)[2]


def shape_of(pixels: Image.Image | Array) -> tuple[int, int, int]:
    """(height, width, channels)."""
    if isinstance(pixels, Image.Image):
        return pixels.height, pixels.width, len(pixels.getbands())
    height, width, channels = pixels.shape
    return height, width, channels


def rows_of(pixels: Image.Image | Array, begin: int, end: int) -> Array:
    """Rows [begin, end), contiguous: (rows, width, channels)."""
    if not isinstance(pixels, Image.Image):
        return np.ascontiguousarray(pixels[begin:end])
    height, width, channels = shape_of(pixels)
    part = pixels if (begin, end) == (0, height) else pixels.crop((0, begin, width, end))
    return np.asarray(part).reshape(end - begin, width, channels)


def to_picture(image: LoadedImage, *, rgb: bool = True, order: ChannelOrder | None = None) -> Picture:
    """Normalise a loaded picture.

    Args:
        image: a Pillow image, or an array or tensor of (height, width), (height, width, channels) or (channels, height,
            width): uint8, other integers 0…255, uint16 0…65535, bool, or floats 0…1 or 0…255.
        rgb: make it RGB; otherwise greyscale stays one channel and alpha stays a fourth.
        order: where an array's channels are; found out when None.

    Raises:
        ImageError: the layout is ambiguous or impossible, or the values are out of range or not finite.
    """
    if isinstance(image, Image.Image):
        return Picture(_pillow_to_rgb(image) if rgb else _keep_bands(image))
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        array = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    else:
        array = image
    array, unit = _to_range(_channels_last(array, order))
    return Picture(_array_to_rgb(array, unit) if rgb else array, unit)


def _pillow_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(image).convert("RGB")
    try:
        if image.mode == "La":
            image = image.convert("LA")  # Pillow has no direct way from premultiplied grey to RGBA
        if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ImageError(f"A picture of Pillow's mode {image.mode} cannot be made RGB: {error}") from error


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale to 8 bits; Pillow's own conversion would clip most of it to white."""
    array, unit = _to_range(np.asarray(image)[..., None], deep=image.mode.startswith("I;16"))
    if array.dtype != np.uint8:
        array = np.rint(array * (255.0 if unit else 1.0)).astype(np.uint8)
    return Image.fromarray(array[..., 0])


def _keep_bands(image: Image.Image) -> Image.Image:
    if image.mode not in ("L", "RGB", "RGBA"):
        raise ImageError(f"do_convert_rgb=False keeps modes L, RGB and RGBA; this picture's mode is {image.mode}.")
    return image


def _channels_last(array: Array, order: ChannelOrder | None) -> Array:
    """A view of (height, width, channels)."""
    if array.ndim == 2 and order in (None, "none", "channels_first", "channels_last"):
        array = array[..., None]
    elif array.ndim != 3 or order == "none":
        raise ImageError(
            f"An array of shape {array.shape} is not a picture (input_data_format: {order}). Pass (height, width), "
            "(height, width, channels) or (channels, height, width)."
        )
    elif _order_of(array.shape, order) == "channels_first":
        array = array.transpose(1, 2, 0)
    height, width, channels = array.shape
    if height < 1 or width < 1:
        raise ImageError(f"A picture of {width}×{height} pixels has none; both sides must be at least 1.")
    if channels not in _CHANNELS:
        raise ImageError(f"{channels} channels (shape {array.shape}, input_data_format: {order}); 1, 3 or 4 are known.")
    if height * width > MAX_PIXELS:
        raise ImageError(f"{width}×{height} pixels are more than the limit of {MAX_PIXELS:,}.")
    return array


def _order_of(shape: tuple[int, ...], order: ChannelOrder | None) -> str:
    if order is not None:
        return order
    first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
    if first and last:
        raise ImageError(
            f"An array of shape {shape} may be channels first or channels last. Pass input_data_format="
            "'channels_first' or 'channels_last'."
        )
    if not first and not last:
        raise ImageError(f"An array of shape {shape} has no axis of 1, 3 or 4 channels at either end.")
    return "channels_first" if first else "channels_last"


def _to_range(array: Array, deep: bool = False) -> tuple[Array, bool]:
    """uint8, or floats with a flag for 0…1. ``deep``: integers are full-range 16-bit, however dark."""
    if array.dtype == np.uint8:
        return array, False
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255), False
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise ImageError(f"An array of {array.dtype} is not a picture; pass uint8, or floats in 0…1 or 0…255.")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("The picture holds NaN or infinite values.")
    if np.issubdtype(array.dtype, np.integer):
        limit = 65535 if array.dtype == np.uint16 or deep or array.dtype == np.int32 else 255
        _check_range(low, high, limit)
        if high > 255 or deep:
            return np.rint(array / 257.0).astype(np.uint8), False
        return array.astype(np.uint8), False
    _check_range(low, high, 255)
    return (array if array.dtype == np.float64 else array.astype(np.float32, copy=False)), bool(high <= 1)


def _check_range(low: Any, high: Any, limit: int) -> None:
    if low < 0 or high > limit:
        raise ImageError(
            f"Values run from {low:g} to {high:g}. Pictures are 0…255 (integers, or floats), 0…1 (floats) or 0…65535 "
            "(uint16); undo any normalisation before passing them."
        )


def _array_to_rgb(array: Array, unit: bool) -> Array:
    channels = array.shape[2]
    if channels == 3:
        return array
    if channels == 1:
        return np.broadcast_to(array, (*array.shape[:2], 3))
    white = 1.0 if unit else 255.0
    alpha = array[..., 3:] / white
    on_white = alpha * array[..., :3] + (1.0 - alpha) * white
    return np.rint(on_white).astype(np.uint8) if array.dtype == np.uint8 else on_white
