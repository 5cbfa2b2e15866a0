"""Where pictures come from: paths, bytes, URLs, data URIs, Pillow images and arrays, in any nesting.

Nothing here resizes. A picture leaves as an upright Pillow image or as the caller's own array; whatever goes wrong on
the way becomes an ``ImageError`` (damaged, too large, not a picture) or a ``FetchError`` (missing, refused, timed out).
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import os
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from smolvlm_fms.errors import FetchError, ImageError, SmolVLMError

__all__ = [
    "FETCH_SECONDS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "ImageSource",
    "LoadedImage",
    "fetch",
    "load_image",
    "nest_images",
]

#: One picture, in any form that is understood.
ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
    " | Image.Image | npt.NDArray[Any] | torch.Tensor"
)
LoadedImage: TypeAlias = "Image.Image | npt.NDArray[Any] | torch.Tensor"

#: A picture of more pixels is refused before it is decoded: the limit at which Pillow speaks of a decompression bomb.
MAX_PIXELS = 178_956_970
#: A file, download or data URI of more bytes is refused.
MAX_FILE_BYTES = 256 * 1024 * 1024
#: A download must be complete after this many seconds, redirects included.
FETCH_SECONDS = 20.0

# Raster formats whose readers are plain parsers. Left out on purpose: EPS runs Ghostscript, and the rest (WMF, FPX,
# FITS, TGA, …) are rare and either call other programs or accept bytes without a signature.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI"),
    *("TIFF", "WEBP"),
)
_ORIENTATION = 0x0112  # the EXIF tag


def load_image(
    source: ImageSource,
    *,
    timeout: float = FETCH_SECONDS,
    max_bytes: int = MAX_FILE_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> LoadedImage:
    """One picture, decoded and upright (EXIF orientation applied); arrays and tensors come back as they are.

    Args:
        source: a path, an http(s) URL, a ``data:`` URI, a base64 text, bytes, an open binary file, a Pillow image, or
            an array. Of an animation, the first frame (of an open Pillow image, the frame it stands at).
        timeout: seconds for a whole download.
        max_bytes: of a file or download.
        max_pixels: width × height, checked before decoding.

    Raises:
        ImageError: not a picture, damaged, truncated or too large.
        FetchError: the file or URL could not be read.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return source
    if isinstance(source, Image.Image):
        return _upright(source, max_pixels, "The Pillow image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), max_pixels, f"The {len(source)} bytes")
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        return _decode(fetch(source, timeout=timeout, max_bytes=max_bytes), max_pixels, source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decode(_data_uri(source, max_bytes), max_pixels, "The data: URI")
    if isinstance(source, str | os.PathLike):
        return _decode(read_file(source, max_bytes), max_pixels, _shorten(os.fspath(source)))
    if hasattr(source, "read"):
        return _decode(_read_stream(source, max_bytes), max_pixels, "The open file")
    raise ImageError(
        f"A picture cannot be made from {type(source).__name__}. Pass a path, URL, data: URI, bytes, Pillow image, "
        "NumPy array or torch tensor."
    )


def fetch(url: str, *, timeout: float = FETCH_SECONDS, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The body of an http(s) URL, after at most five redirects.

    Raises:
        FetchError: refused, not found, slower than ``timeout`` seconds in all, or larger than ``max_bytes``.
    """
    import httpx  # only those who use URLs pay for its import

    deadline = time.monotonic() + timeout
    body = bytearray()
    try:
        with (
            httpx.Client(timeout=timeout, follow_redirects=True, max_redirects=5) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > max_bytes:
                    raise FetchError(f"{_shorten(url)} is larger than {max_bytes:,} bytes; it was not read further.")
                if time.monotonic() > deadline:
                    raise FetchError(f"{_shorten(url)} was not complete after {timeout:g} s.")
    except httpx.TimeoutException as error:
        raise FetchError(f"{_shorten(url)} did not answer within {timeout:g} s.") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise FetchError(f"{_shorten(url)} could not be fetched: {error}") from error
    return bytes(body)


def nest_images(images: Any) -> list[list[Any]]:
    """Samples of pictures: one picture, a list of them (one sample), or a list of lists; 4-D arrays count as lists.

    Returns a list of samples, each a list of pictures, not yet loaded. A sample may be empty, but not all of them.

    Raises:
        ImageError: nothing to process, or lists mixed with pictures at the same level.
    """
    nested = _nest(images)
    if not any(nested):
        raise ImageError("There is no picture in this batch. Leave `images` out for text alone.")
    return nested


def _nest(images: Any) -> list[list[Any]]:
    if not isinstance(images, list | tuple):
        return [list(_unstack(images))]
    samples = [isinstance(item, list | tuple) for item in images]
    if any(samples):
        if not all(samples):
            raise ImageError("`images` mixes pictures and lists of pictures; pass one list for each sample.")
        return [[picture for item in sample for picture in _unstack(item)] for sample in images]
    if images and all(_is_array(item) and item.ndim == 4 for item in images):
        return [list(item) for item in images]
    return [[picture for item in images for picture in _unstack(item)]]


def _unstack(item: Any) -> Iterator[Any]:
    if item is None:
        raise ImageError("None is not a picture. Leave it out, or pass an empty list for a sample without pictures.")
    if isinstance(item, list | tuple):
        raise ImageError("`images` is nested too deeply; pass a picture, a list of pictures or a list of such lists.")
    if _is_array(item) and item.ndim == 4:
        yield from item
    else:
        yield item


def _is_array(item: Any) -> bool:
    return isinstance(item, np.ndarray | torch.Tensor)


def _decode(data: bytes, max_pixels: int, name: str) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: empty, not a picture.")
    try:
        image = Image.open(io.BytesIO(data), formats=_readable_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not a picture; it begins with {data[:12]!r}. These are read: {', '.join(_readable_formats())}."
        ) from error
    except Exception as error:  # decoders of untrusted bytes raise whatever they trip over
        raise ImageError(f"{name}: could not be opened as a picture: {error}") from error
    return _upright(image, max_pixels, name)


def _upright(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}×{height} pixels; a picture has at least one on each side.")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}×{height} pixels are more than the limit of {max_pixels:,}.")
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"{name}: damaged or truncated: {error}") from error
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image  # exif_transpose would copy it
        return ImageOps.exif_transpose(image)
    except Exception:
        # A broken EXIF block is no reason to refuse a picture whose pixels are fine.
        return image


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Those of the formats that this build of Pillow has (AVIF and JPEG 2000 are optional there)."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _data_uri(uri: str, max_bytes: int) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError("The data: URI has no comma, so no data.")
    if len(payload) > max_bytes * 4 // 3 + 4:
        raise ImageError(f"The data: URI holds more than {max_bytes:,} bytes.")
    if header.lower().rstrip().endswith(";base64"):
        return _base64(urllib.parse.unquote(payload))
    return urllib.parse.unquote_to_bytes(payload)


def _base64(text: str) -> bytes:
    try:
        compact = "".join(text.split())
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"The base64 text is damaged: {error}") from error


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file, or of bare base64 text; only of a regular file, so that nothing hangs.

    Raises FetchError where there is no such file, ImageError where it is larger than ``max_bytes``.
    """
    text = os.fspath(path)
    try:
        file = Path(text)
        if file.is_file():
            size = file.stat().st_size
            if size <= max_bytes:
                return file.read_bytes()
            raise ImageError(f"{_shorten(text)}: {size:,} bytes are more than the limit of {max_bytes:,}.")
        if text and file.is_dir():
            raise FetchError(f"{_shorten(text)} is a folder, not a picture.")
    except SmolVLMError:
        raise
    except PermissionError as error:
        raise FetchError(f"{_shorten(text)}: {error}") from error
    except (OSError, ValueError):
        pass  # too long for a file name, or a null character: no path, but it may be base64
    return _bare_base64(path, text)


def _bare_base64(path: str | os.PathLike[str], text: str) -> bytes:
    """transformers takes bare base64 in place of a path; a real picture is never shorter than 64 characters of it."""
    if isinstance(path, str) and len(text) >= 64:
        try:
            return _base64(text)
        except ImageError:
            pass
    raise FetchError(f"{_shorten(text)}: no such file. Pass a path, an http(s) URL or a data: URI.")


def _read_stream(stream: Any, max_bytes: int) -> bytes:
    try:
        data = stream.read(max_bytes + 1)
    except (OSError, ValueError, TypeError) as error:
        raise FetchError(f"The open file could not be read: {error}") from error
    if not isinstance(data, bytes | bytearray):
        raise ImageError("The open file gives text, not bytes; open it in binary mode ('rb').")
    if len(data) > max_bytes:
        raise ImageError(f"The open file holds more than {max_bytes:,} bytes.")
    return bytes(data)


def _shorten(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:80]}… ({len(text)} characters)"
