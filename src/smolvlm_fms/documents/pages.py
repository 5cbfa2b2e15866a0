"""Pages as pictures: of a PDF, of a TIFF with several frames, or the one page that a picture is."""

from __future__ import annotations

import hashlib
import io
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from smolvlm_fms.errors import ConfigurationError, DocumentError, FetchError, InputError, MissingDependencyError
from smolvlm_fms.processing.sources import MAX_FILE_BYTES, load_image

__all__ = ["MAX_SIDE", "POINTS_PER_INCH", "PageSource", "open_document", "parse_pages"]

POINTS_PER_INCH = 72
#: Pages are drawn at most this large: the processors shrink what is larger, and a drawing of a poster takes gigabytes.
MAX_SIDE = 4096

_PASSWORD_ERROR = 4  # FPDF_ERR_PASSWORD in PDFium's public header fpdfview.h
_MAX_DPI = 1200


class PageSource(Protocol):
    """A document as pages, numbered from 1. ``digest`` tells its content; use it in a ``with`` block."""

    name: str
    digest: str
    count: int

    def size(self, number: int) -> tuple[float, float]:
        """Width and height of a page: points of 1/72 inch for a PDF, pixels for pictures."""

    def render(self, number: int) -> Image.Image:
        """Draw a page, RGB. Raises DocumentError or ImageError where it is damaged."""

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> PageSource: ...

    def __exit__(self, *_: object) -> None: ...


class _Closing(AbstractContextManager[Any]):
    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""


def open_document(path: str | Path, *, dpi: int = 144, password: str | None = None) -> PageSource:
    """Open a PDF or a picture (PNG, JPEG, TIFF with one page a frame …).

    dpi: how finely PDF pages are drawn (their longest side at most 4096 pixels); pictures stay as they are.
    password: of an encrypted PDF.

    Raises FetchError (no such file), DocumentError (empty, encrypted, damaged, no pages), ImageError (neither PDF nor
    picture, or a damaged one), MissingDependencyError (a PDF without pypdfium2).
    """
    if not 1 <= dpi <= _MAX_DPI:
        raise ConfigurationError(f"dpi must be from 1 to {_MAX_DPI}; it is {dpi}.")
    data = _read(Path(path))
    if b"%PDF-" in data[:1024]:  # readers accept leading junk of that length
        return PdfPages(data, str(path), dpi, password)
    return PicturePages(data, str(path))


class PdfPages(_Closing):
    """Pages of a PDF, drawn by PDFium. Not for several threads at once: PDFium has one global state."""

    def __init__(self, data: bytes, name: str, dpi: int, password: str | None) -> None:
        try:
            import pypdfium2
        except ImportError as error:
            raise MissingDependencyError("PDF pages need pypdfium2: pip install 'smolvlm-fms[docling]'.") from error
        self.name = name
        self.digest = hashlib.sha256(data).hexdigest()
        self._dpi = dpi
        self._error = pypdfium2.PdfiumError
        try:
            self._pdf = pypdfium2.PdfDocument(data, password=password)
        except self._error as error:
            raise _unreadable(name, error, password, b"/Encrypt" in data) from error
        self.count = len(self._pdf)
        if self.count < 1:
            self.close()
            raise DocumentError(f"{name}: a PDF without pages.")

    def __enter__(self) -> PdfPages:
        return self

    def size(self, number: int) -> tuple[float, float]:
        width, height = self._page(number).get_size()
        return float(width), float(height)

    def render(self, number: int) -> Image.Image:
        page = self._page(number)
        width, height = page.get_size()
        if not (width > 0 and height > 0):
            raise DocumentError(
                f"{self.name}, page {number}: it is {width:g}×{height:g} points large; nothing to draw."
            )
        scale = min(self._dpi / POINTS_PER_INCH, MAX_SIDE / max(width, height))
        try:
            return page.render(scale=scale).to_pil().convert("RGB")  # type: ignore[no-any-return]
        except (self._error, ValueError, MemoryError) as error:
            raise DocumentError(f"{self.name}, page {number}: it cannot be drawn: {error}") from error

    def close(self) -> None:
        self._pdf.close()

    def _page(self, number: int) -> Any:
        try:
            return self._pdf[number - 1]
        except self._error as error:
            raise DocumentError(f"{self.name}, page {number}: damaged; PDFium says: {error}") from error


class PicturePages(_Closing):
    """A picture as a page, or each frame of a TIFF (what scanners write) as one."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self.digest = hashlib.sha256(data).hexdigest()
        self._data = data
        self._tiff = data[:4] in (b"II*\0", b"MM\0*")
        self.count = 1
        if not self._tiff:
            load_image(data)  # that it is no picture at all should be said before a model is loaded
            return
        try:
            with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
                self.count = int(getattr(image, "n_frames", 1))
        except Exception as error:  # decoders of untrusted bytes raise whatever they trip over
            raise DocumentError(f"{name}: a TIFF that cannot be read: {error}") from error

    def __enter__(self) -> PicturePages:
        return self

    def size(self, number: int) -> tuple[float, float]:
        width, height = self.render(number).size
        return float(width), float(height)

    def render(self, number: int) -> Image.Image:
        source: Any = self._data
        if self._tiff:
            try:
                source = Image.open(io.BytesIO(self._data), formats=["TIFF"])
                source.seek(number - 1)
            except Exception as error:
                raise DocumentError(f"{self.name}, page {number}: damaged: {error}") from error
        image = load_image(source)
        assert isinstance(image, Image.Image)
        return image if image.mode == "RGB" else _on_white(image)


def parse_pages(text: str | None, count: int) -> list[int]:
    """Page numbers out of ``"1-3,7,9-"`` (None: all), in the document's order.

    Raises InputError for text of another form and for pages that the document does not have.
    """
    if text is None:
        return list(range(1, count + 1))
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d*)\s*)?", part)
        if found is None:
            raise InputError(f"--pages has {part.strip()!r}; write page numbers and ranges, such as 1-3,7 or 5-.")
        first = int(found[1])
        last = first if found[2] is None else int(found[3]) if found[3] else count
        if not 1 <= first <= last <= count:
            raise InputError(f"--pages asks for {part.strip()!r}; the document has the pages 1 to {count}.")
        chosen |= set(range(first, last + 1))
    return sorted(chosen)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    page = Image.new("RGBA", layer.size, "white")
    page.alpha_composite(layer)
    return page.convert("RGB")


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DocumentError(f"{path}: {size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, DocumentError):
            raise
        raise FetchError(f"{path} cannot be read: {error}") from error
    if not data:
        raise DocumentError(f"{path}: empty, neither a PDF nor a picture.")
    return data


def _unreadable(name: str, error: Any, password: str | None, encrypted: bool) -> DocumentError:
    # PDFium's last error may be that of the document before, so its word on passwords is not enough.
    if encrypted and getattr(error, "err_code", None) == _PASSWORD_ERROR:
        what = "the password is wrong" if password else "encrypted; pass its password (--password)"
        return DocumentError(f"{name}: {what}.")
    return DocumentError(f"{name}: a PDF that is damaged or has no pages: {error}")
