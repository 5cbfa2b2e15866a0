"""The compiled resize (``csrc/resample.c``): Pillow's pixels to the bit, several times as fast, on all cores.

It is optional. Without a compiler at installation, or with ``SMOLVLM_NATIVE_RESIZE=0``, Pillow does the same work.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from smolvlm_fms.processing.pixels import rows_of, shape_of
from smolvlm_fms.processing.threads import bands, in_threads

__all__ = ["can_resize", "can_write", "resize", "write"]

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float64]

_LIBRARY = Path(__file__).with_name("libresample.so")
_BITS = 22  # Pillow's weights: 32 bits less 8 of a pixel and 2 of room for overshoot
_LANES = 32  # rows at a time
# From 13 on, Pillow takes the height first where it loses more than twice as many pixels as the width.
_PILLOW_TURNS = int(PIL.__version__.split(".")[0]) >= 13
_i64, _ptr = ctypes.c_int64, ctypes.c_void_p


class _Axis(ctypes.Structure):
    """``struct axis``"""

    _fields_ = [("first", _ptr), ("count", _ptr), ("weights", _ptr), ("taps", _i64)]


def can_resize(channels: int, resample: Image.Resampling) -> bool:
    """Whether :func:`resize` is here and has this filter. Alpha channels stay with Pillow: they weigh the colours."""
    return channels in (1, 3) and resample in _FILTERS and _library() is not None


def can_write(tile: npt.NDArray[Any]) -> bool:
    """Whether :func:`write` takes this tile here: bytes with whole pixels next to each other."""
    near = tile.strides[1:] == (tile.shape[2], 1)
    return tile.dtype == np.uint8 and near and tile.strides[0] > 0 and _library() is not None


def resize(pixels: Image.Image | Bytes, size: tuple[int, int], resample: Image.Resampling, threads: int = 1) -> Bytes:
    """A picture, or height × width × channels, by Pillow's ``resize`` to ``size``, which is (height, width)."""
    library = _library()
    assert library is not None
    return _resize(library, pixels, size, resample, threads)


def _resize(
    library: ctypes.CDLL, pixels: Image.Image | Bytes, size: tuple[int, int], resample: Image.Resampling, threads: int
) -> Bytes:
    height, width, _ = shape_of(pixels)
    if _PILLOW_TURNS and height - size[0] > max(0, 2 * (width - size[1])):
        turned = _down(library, rows_of(pixels, 0, height), size, resample, threads)
        return _across(library, turned, size, resample, threads)
    return _down(library, _across(library, pixels, size, resample, threads), size, resample, threads)


def _across(
    library: ctypes.CDLL, pixels: Image.Image | Bytes, size: tuple[int, int], resample: Image.Resampling, threads: int
) -> Bytes:
    (height, width, channels), target = shape_of(pixels), size[1]
    if width == target:
        return rows_of(pixels, 0, height)
    axis, out = _axis(width, target, resample), np.empty((height, target, channels), np.uint8)

    def work(rows: tuple[int, int]) -> None:
        part, resized = rows_of(pixels, *rows), out[rows[0] : rows[1]]
        room = np.empty((width + target) * channels * _LANES, np.uint8)
        arrays = _address(part), _address(resized)
        library.svr_horizontal(*arrays, width, target, channels, ctypes.byref(axis[0]), len(part), _address(room))

    # Pillow's images become bytes under Python's lock: those of one band while another is resized.
    in_threads(work, bands(height, threads, most=128), threads)
    return out


def _down(
    library: ctypes.CDLL, pixels: Bytes, size: tuple[int, int], resample: Image.Resampling, threads: int
) -> Bytes:
    (height, width, channels), target = pixels.shape, size[0]
    if height == target:
        return pixels
    axis, out = _axis(height, target, resample), np.empty((target, width, channels), np.uint8)

    def work(rows: tuple[int, int]) -> None:
        library.svr_vertical(_address(pixels), _address(out), width * channels, ctypes.byref(axis[0]), *rows)

    in_threads(work, bands(target, threads), threads)
    return out


def write(tile_HWC: Bytes, out_CHW: npt.NDArray[np.float32], tables: npt.NDArray[np.float32]) -> None:
    """Look every byte up in its channel's table (channels, 256) and store it as a float, channels first."""
    library = _library()
    assert library is not None and out_CHW.flags.c_contiguous and tables.flags.c_contiguous
    height, width, channels = tile_HWC.shape
    library.svr_write(
        _address(tile_HWC), tile_HWC.strides[0], _address(out_CHW), height, width, channels, _address(tables)
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("SMOLVLM_NATIVE_RESIZE") == "0" or sys.byteorder != "little" or not _LIBRARY.is_file():
        return None
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError:
        return None  # built for another machine
    axis = ctypes.POINTER(_Axis)
    library.svr_vertical.argtypes = [_ptr, _ptr, _i64, axis, _i64, _i64]
    library.svr_horizontal.argtypes = [_ptr, _ptr, _i64, _i64, _i64, axis, _i64, _ptr]
    library.svr_write.argtypes = [_ptr, _i64, _ptr, _i64, _i64, _i64, _ptr]
    for function in (library.svr_vertical, library.svr_horizontal, library.svr_write):
        function.restype = None
    return library if _agrees_with_pillow(library) else None


def _agrees_with_pillow(library: ctypes.CDLL) -> bool:
    """A millisecond's comparison with the Pillow that is installed: a release may change its arithmetic or its order.

    Each size falls on another side of a decision that some release has made: across first, or down first.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    for size in ((50, 70), (20, 18), (20, 60), (60, 18), (12, 34), (30, 30)):
        for resample in _FILTERS:
            expected = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), resample))
            if not np.array_equal(_resize(library, pixels, size, resample, 1), expected):
                return False
    return True


@functools.lru_cache(maxsize=64)
def _axis(source: int, target: int, resample: Image.Resampling) -> tuple[_Axis, tuple[npt.NDArray[np.int32], ...]]:
    """Where each output pixel looks, and with which weights; the arrays are kept beside the pointers to them.

    Pillow's own recipe (``precompute_coeffs`` and ``normalize_coeffs_8bpc`` in its Resample.c), in doubles throughout.
    """
    weigh, support = _FILTERS[resample]
    scale = source / target
    stretch = max(scale, 1.0)
    reach = support * stretch
    taps = math.ceil(reach) * 2 + 1
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int64), source) - first
    step = np.arange(taps)
    weights = weigh((step + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch))
    weights[step >= count[:, None]] = 0.0
    total = np.zeros(target)
    for tap in range(taps):  # one after the other, because the order decides the last bit
        total += weights[:, tap]
    weights /= np.where(total == 0.0, 1.0, total)[:, None]
    fixed = np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    arrays = (first.astype(np.int32), count.astype(np.int32), fixed)
    return _Axis(*(_address(array) for array in arrays), taps), arrays


def _sinc(x: Floats) -> Floats:
    angle = x * math.pi
    return np.where(x == 0.0, 1.0, np.sin(angle) / np.where(x == 0.0, 1.0, angle))


def _box(x: Floats) -> Floats:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: Floats) -> Floats:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: Floats) -> Floats:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: Floats) -> Floats:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


_FILTERS: dict[Image.Resampling, tuple[Callable[[Floats], Floats], float]] = {
    Image.Resampling.BOX: (_box, 0.5),
    Image.Resampling.BILINEAR: (_bilinear, 1.0),
    Image.Resampling.BICUBIC: (_bicubic, 2.0),
    Image.Resampling.LANCZOS: (_lanczos, 3.0),
}


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data
