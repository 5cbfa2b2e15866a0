"""The whole way from a PDF to Markdown: with a scripted model, and through the command line with a tiny random one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import smolvlm_fms as sv
from smolvlm_fms.cli import app
from smolvlm_fms.documents.convert import ConvertOptions, ElementLoop, convert_pages, settings_of
from smolvlm_fms.documents.pages import open_document
from smolvlm_fms.documents.sidecar import PageResult, Sidecar
from smolvlm_fms.errors import ConfigurationError, FetchError
from tests.pdfs import pdf
from tests.scripted import build_docling_checkpoint, scripted_vlm

TITLE = (
    "<doctag><section_header_level_1><loc_10><loc_20><loc_300><loc_40>The report</section_header_level_1>\n</doctag>"
)
TABLE = (
    "<doctag><text><loc_10><loc_20><loc_490><loc_40>See the table.</text>\n"
    "<otsl><loc_10><loc_50><loc_490><loc_90><ched>Cats<ched>Dogs<nl><fcel>three<fcel>one<nl></otsl>\n"
    "<unordered_list><list_item><loc_10><loc_95><loc_490><loc_99>a cat</list_item>\n</unordered_list>\n</doctag>"
)
CODE = (
    "<doctag><code><loc_10><loc_20><loc_490><loc_60><_Python_>def main():\n    return 42</code>\n"
    "<formula><loc_10><loc_70><loc_490><loc_80>\\frac{a}{b}</formula>\n"
    "<picture><loc_10><loc_100><loc_490><loc_400><bar_chart><caption><loc_10><loc_410><loc_490><loc_420>Cats a year"
    "</caption></picture>\n</doctag>"
)
LOOP = "<doctag>" + "".join(
    f"<text><loc_{n}><loc_{n + 1}><loc_{n + 2}><loc_{n + 3}>the cat</text>\n" for n in range(0, 400, 4)
)
SCRIPTS: dict[int, str | Exception] = {
    0: TITLE, 60: TABLE, 120: CODE, 180: LOOP, 220: RuntimeError("out of luck"), 255: "Just words."
}  # fmt: skip


def greys(*values: int) -> list[float]:
    return [value / 255 for value in values]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_docling_checkpoint(tmp_path_factory.mktemp("docling"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> sv.VLM:
    return scripted_vlm(folder, SCRIPTS)


@pytest.fixture
def document(tmp_path: Path) -> Callable[..., Path]:
    def make(*values: int, **options: Any) -> Path:
        path = tmp_path / "report.pdf"
        path.write_bytes(pdf(greys(*values), **options))
        return path

    return make


def results(vlm: sv.VLM, path: Path, **options: Any) -> list[PageResult]:
    with open_document(path) as source:
        return list(convert_pages(vlm, source, range(1, source.count + 1), ConvertOptions(**options)))


def test_pages_come_in_order_with_their_special_tokens(vlm: sv.VLM, document: Callable[..., Path]) -> None:
    found = results(vlm, document(60, 0, 120, 60))
    assert [page.number for page in found] == [1, 2, 3, 4]
    assert [page.text for page in found] == [TABLE, TITLE, CODE, TABLE]
    assert {page.status for page in found} == {"done"} and {page.message for page in found} == {""}
    assert all(page.size == (120.0, 160.0) and page.tokens > 10 for page in found)


def test_pages_are_generated_together(folder: Path, document: Callable[..., Path]) -> None:
    path, widths = document(*[60] * 6), []
    for batch in (1, 3):
        vlm = scripted_vlm(folder, SCRIPTS)
        found = results(vlm, path, batch=batch)
        assert [page.text for page in found] == [TABLE] * 6
        widths.append(vlm.engine.backend.widest)  # type: ignore[attr-defined]
    assert widths == [1, 3]


def test_what_went_wrong_with_a_page_is_said_and_the_others_are_kept(
    vlm: sv.VLM, document: Callable[..., Path]
) -> None:
    found = results(vlm, document(0, 180, 220, 255, 60, 120, missing=[6]))
    assert [page.status for page in found] == ["done", "loop", "failed", "plain", "done", "failed"]
    assert "repeated itself" in found[1].message and found[1].text.count("the cat") == 16
    assert "out of luck" in found[2].message and "page 6: damaged" in found[5].message
    assert "no DocTags" in found[3].message and found[3].text == "Just words."
    assert found[4].text == TABLE


def test_each_page_has_its_budget(vlm: sv.VLM, document: Callable[..., Path]) -> None:
    heard: list[tuple[int, int]] = []
    with open_document(document(0, 60)) as source:
        options = ConvertOptions(max_tokens=40)
        found = list(convert_pages(vlm, source, [1, 2], options, on_tokens=lambda *said: heard.append(said)))
    assert [page.status for page in found] == ["done", "length"]
    assert found[1].tokens == 40 and "budget of 40" in found[1].message
    assert TABLE.startswith(found[1].text) and len(found[1].text) > 60
    assert heard[-1] == (2, 40) and heard == sorted(heard)


def test_a_run_goes_on_where_it_stopped(folder: Path, tmp_path: Path, document: Callable[..., Path]) -> None:
    path, notes, options = document(0, 60, 120, 220), tmp_path / "notes.jsonl", ConvertOptions(batch=2)
    vlm = scripted_vlm(folder, SCRIPTS)
    with open_document(path) as source:
        settings = settings_of(vlm, source, options, 144)
        sidecar = Sidecar(notes, settings)
        running = convert_pages(vlm, source, [1, 2, 3, 4], options, sidecar=sidecar)
        assert next(running).text == TITLE and next(running).text == TABLE
        running.close()  # as Ctrl-C does
        assert not vlm.engine.busy, "pages on their way are not generated to their end"
        sidecar.close(remove=False)
        notes.write_text(notes.read_text() + '{"number": 3, "sta')  # a crash in the middle of a line

        again = scripted_vlm(folder, SCRIPTS)
        sidecar = Sidecar(notes, settings)
        assert sorted(sidecar.done) == [1, 2]
        found = list(convert_pages(again, source, [1, 2, 3, 4], options, sidecar=sidecar))
        assert [page.text for page in found] == [TITLE, TABLE, CODE, ""]
        assert again.engine.backend.greys == [120, 220]  # type: ignore[attr-defined]
        assert sorted(sidecar.done) == [1, 2, 3], "failed pages are tried again"
        sidecar.close(remove=False)

        other = Sidecar(notes, settings_of(vlm, source, ConvertOptions(max_tokens=9), 144))
        assert other.done == {}, "other settings, other pages"
        other.close(remove=True)
    assert not notes.exists()
    with pytest.raises(FetchError, match="cannot be used"):
        Sidecar(tmp_path / "no" / "notes.jsonl", settings)
    path.write_bytes(pdf(greys(0, 60, 120, 60)))
    with open_document(path) as changed:
        assert settings_of(vlm, changed, options, 144) != settings


def test_loops_of_elements() -> None:
    def looped(*elements: str) -> bool:
        detector = ElementLoop()
        text = "".join(elements)
        return any(detector.push(text[at : at + 3]) for at in range(0, len(text), 3))

    assert looped(*(f"<text><loc_{n}>Again</text>" for n in range(16)))
    assert not looped(*(f"<text><loc_{n}>Again</text>" for n in range(15)))
    assert looped(*(f"<text><loc_{n}>A</text><formula><loc_{n}>b</formula>" for n in range(9)))
    assert not looped(*(f"<picture><loc_{n}></picture>" for n in range(50))), "a page full of icons"
    assert looped(*["<picture><loc_1></picture>"] * 16)
    assert not looped(*(f"<list_item><loc_{n}>Item {n}</list_item>" for n in range(100)))


def test_options_are_checked() -> None:
    for bad in ({"max_tokens": 0}, {"batch": 0}):
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            ConvertOptions(**bad)


# The command


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["convert-document", *map(str, arguments)])


@pytest.fixture
def scripted(vlm: sv.VLM, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """``sv.load`` gives the scripted model; the list holds what it was asked for."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(sv, "load", lambda name, **options: (calls.append({"name": name, **options}), vlm)[1])
    return calls


def test_the_command_writes_markdown(scripted: list[Any], document: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    done = run(document(0, 60, 120), "-o", out, "--batch", 2, "--threads", 1)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert text.startswith("## The report\n\nSee the table.\n\n| Cats")
    assert "- a cat\n" in text and "def main():\n    return 42" in text and r"$$\frac{a}{b}$$" in text
    assert scripted[0]["threads"] == 1 and scripted[0]["engine"].max_sequences == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.md"]
    assert done.output == ""


def test_the_formats(scripted: list[Any], document: Callable[..., Path], tmp_path: Path) -> None:
    path = document(0, 60)
    assert run(path, "-o", tmp_path / "a.html").exit_code == 0
    assert "<h2>The report</h2>" in (tmp_path / "a.html").read_text()
    assert run(path, "-o", tmp_path / "a.json", "--pages", "2-").exit_code == 0
    assert list(json.loads((tmp_path / "a.json").read_text())["pages"]) == ["2"]
    done = run(path, "--to", "doctags")
    assert done.stdout.count("<page_break>") == 1 and "<fcel>three<fcel>one<nl>" in done.stdout
    assert run(path, "--to", "md").stdout == run(path).stdout != ""
    pictures = run(document(120), "--to", "html", "--pictures")
    assert "data:image/png;base64," in pictures.stdout


def test_failed_pages_give_exit_code_3_and_are_tried_again(
    scripted: list[Any], vlm: sv.VLM, document: Callable[..., Path], tmp_path: Path
) -> None:
    out, notes = tmp_path / "out.md", tmp_path / "out.md.pages.jsonl"
    path = document(0, 220, 60, 180)
    done = run(path, "-o", out)
    assert done.exit_code == 3
    assert "page 2: failed: RuntimeError: out of luck" in done.stderr and "pages that failed: 2;" in done.stderr
    assert "page 4: loop: the model repeated itself" in done.stderr
    assert "The report" in out.read_text() and "the cat" in out.read_text() and notes.exists()

    vlm.engine.backend.greys.clear()  # type: ignore[attr-defined]
    vlm.engine.images.clear()
    done = run(path, "-o", out)
    assert done.exit_code == 3 and "3 of 4 pages are there" in done.stderr
    assert vlm.engine.backend.greys == [220]  # type: ignore[attr-defined]
    assert run(path, "-o", out, "--restart", "--pages", "1").exit_code == 0
    assert not notes.exists() and out.read_text() == "## The report\n"


def test_nothing_is_written_where_no_page_could_be_converted(
    scripted: list[Any], document: Callable[..., Path], tmp_path: Path
) -> None:
    done = run(document(220, 0, missing=[2]), "-o", tmp_path / "out.md")
    assert isinstance(done.exception, sv.InputError) and "None of the 2 pages" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["report.pdf"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "docx"], "docx"), (["--pages", "7"], "pages 1 to 1"), (["--dpi", "0"], "dpi"),
        (["--max-tokens", "0"], "max_tokens"), (["-o", "no/such/out.md"], "does not exist"), (["-o", "."], "a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_model_is_loaded(
    scripted: list[Any], document: Callable[..., Path], arguments: list[str], said: str
) -> None:
    done = run(document(0), *arguments)
    assert isinstance(done.exception, sv.SmolVLMError) and said in str(done.exception)
    assert scripted == []


def test_a_real_checkpoint_from_page_to_file(folder: Path, tmp_path: Path) -> None:
    Image.effect_noise((96, 128), 80).save(tmp_path / "page.png")
    options = ("--model", folder, "--max-tokens", 30, "--dtype", "float32", "--threads", 1)
    done = run(tmp_path / "page.png", *options, "-o", tmp_path / "out.json", "--prompt", "Read.", "--detail", "low")
    assert done.exit_code == 0, done.output
    fields = json.loads((tmp_path / "out.json").read_text())
    assert fields["pages"]["1"]["size"] == {"width": 96.0, "height": 128.0}
    assert re.search(r"page 1: (length|plain|loop): ", done.stderr)
    assert run(tmp_path / "page.png", *options, "--to", "doctags").stdout.startswith("<doctag>")
