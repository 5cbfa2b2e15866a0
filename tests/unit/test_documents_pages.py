"""Pages of PDFs, TIFFs and pictures as pictures; files that are none of these."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from smolvlm_fms.documents.pages import MAX_SIDE, open_document, parse_pages
from smolvlm_fms.errors import (
    ConfigurationError,
    DocumentError,
    FetchError,
    ImageError,
    InputError,
    MissingDependencyError,
)
from tests.pdfs import pdf


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_pdf_pages_are_drawn_at_their_resolution(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", b"junk\n" + pdf([0.0, 0.5, 1.0]))
    with open_document(path, dpi=144) as source:
        assert (source.count, source.size(2)) == (3, (120.0, 160.0))
        pages = [source.render(number) for number in (1, 2, 3)]
        assert [page.size for page in pages] == [(240, 320)] * 3
        assert [page.mode for page in pages] == ["RGB"] * 3
        assert [page.getpixel((120, 160)) for page in pages] == [(0,) * 3, (128,) * 3, (255,) * 3]
    with open_document(path, dpi=36) as coarse:
        assert coarse.render(1).size == (60, 80)
        assert coarse.digest == source.digest


def test_a_poster_does_not_fill_the_memory(tmp_path: Path) -> None:
    with open_document(write(tmp_path / "a.pdf", pdf(size=(14_000, 7_000))), dpi=300) as source:
        assert max(source.render(1).size) == MAX_SIDE


def test_a_damaged_page_fails_alone(tmp_path: Path) -> None:
    with open_document(write(tmp_path / "a.pdf", pdf([0.0, 0.5, 1.0], missing=[2]))) as source:
        assert source.count == 3
        with pytest.raises(DocumentError, match=r"a\.pdf, page 2: damaged"):
            source.render(2)
        assert source.render(3).getpixel((9, 9)) == (255, 255, 255)


def test_encrypted_pdfs_need_their_password(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", pdf([0.5], password="secret"))
    with pytest.raises(DocumentError, match="encrypted; pass its password"):
        open_document(path)
    with pytest.raises(DocumentError, match="the password is wrong"):
        open_document(path, password="other")
    with open_document(path, password="secret") as source:
        assert source.render(1).getpixel((9, 9)) == (128, 128, 128)
    with pytest.raises(DocumentError, match="has no pages"):  # PDFium still has the other file's error in mind
        open_document(write(tmp_path / "b.pdf", pdf([])))


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "empty"), (pdf()[:80], "damaged"), (b"%PDF-1.7\n" + bytes(500), "damaged"), (pdf([]), "no pages")],
)
def test_files_that_are_no_documents(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        open_document(write(tmp_path / "a.pdf", data))


def test_pictures_are_documents_of_one_page(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (30, 40), (255, 0, 0, 0))
    clear.save(tmp_path / "a.png")
    with open_document(tmp_path / "a.png") as source:
        assert (source.count, source.size(1)) == (1, (30.0, 40.0))
        assert source.render(1).getpixel((5, 5)) == (255, 255, 255)
    with pytest.raises(ImageError, match="not a picture"):
        open_document(write(tmp_path / "a.txt", b"Only words, and no picture at all"))
    with pytest.raises(ImageError, match="damaged"):
        open_document(write(tmp_path / "b.png", (tmp_path / "a.png").read_bytes()[:60]))
    with pytest.raises(FetchError, match="nowhere"):
        open_document(tmp_path / "nowhere.pdf")


def test_frames_of_a_tiff_are_pages(tmp_path: Path) -> None:
    frames = [Image.new("L", (20 + index, 30), 60 * index) for index in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])
    with open_document(write(tmp_path / "scan.tif", buffer.getvalue())) as source:
        assert source.count == 3
        assert [source.render(number).getpixel((3, 3)) for number in (3, 1)] == [(120,) * 3, (0,) * 3]
        assert source.size(2) == (21.0, 30.0)
    with pytest.raises(DocumentError, match="TIFF"):
        open_document(write(tmp_path / "b.tif", b"II*\0nonsense"))


def test_pypdfium2_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(MissingDependencyError, match=r"smolvlm-fms\[docling\]"):
        open_document(write(tmp_path / "a.pdf", pdf()))


@pytest.mark.parametrize("dpi", [0, -3, 5000])
def test_resolutions_are_checked(tmp_path: Path, dpi: int) -> None:
    with pytest.raises(ConfigurationError, match="dpi"):
        open_document(write(tmp_path / "a.pdf", pdf()), dpi=dpi)


def test_page_numbers() -> None:
    assert parse_pages(None, 3) == [1, 2, 3]
    assert parse_pages("2", 3) == [2]
    assert parse_pages(" 3, 1-2 ,2", 3) == [1, 2, 3]
    assert parse_pages("4-", 6) == [4, 5, 6]
    for bad in ("", "0", "4", "2-1", "1-9", "a", "1,,2", "-2", "1-2-3"):
        with pytest.raises(InputError, match="--pages"):
            parse_pages(bad, 3)
