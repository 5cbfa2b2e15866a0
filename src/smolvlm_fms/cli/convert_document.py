"""``smolvlm convert-document``: a PDF or a picture of a page to Markdown, HTML, JSON or DocTags."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from smolvlm_fms.errors import FetchError, InputError

DEFAULT_MODEL = "ibm-granite/granite-docling-258M"
SUFFIXES = {".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".json": "json", ".doctags": "doctags",
            ".dt": "doctags"}  # fmt: skip
INCOMPLETE = 3


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("convert-document", no_args_is_help=True)(convert_document)


def convert_document(
    file: Path = typer.Argument(..., metavar="FILE", help="A PDF, or a picture of a page (PNG, JPEG, TIFF …)."),
    output: Path | None = typer.Option(None, "--output", "-o", help="File to write; without it, standard output."),
    to: str | None = typer.Option(None, help="md, html, json or doctags; by default what the output's name says."),
    model: str = typer.Option(DEFAULT_MODEL, "--model", "-m", help="A Docling checkpoint: a folder or a hub id."),
    pages: str | None = typer.Option(None, help="Such as 1-3,7 or 5-; by default all."),
    max_tokens: int = typer.Option(4096, help="A page's budget, in tokens."),
    batch: int = typer.Option(4, help="Pages generated at once."),
    dpi: int = typer.Option(144, help="How finely PDF pages are drawn, in dots per inch."),
    detail: str | None = typer.Option(None, help="high, auto or low; by default the checkpoint's own rule."),
    prompt: str | None = typer.Option(None, help="Another instruction than 'Convert this page to docling.'"),
    pictures: bool = typer.Option(False, "--pictures", help="Put the pages' pictures into the output."),
    password: str | None = typer.Option(None, envvar="SMOLVLM_PDF_PASSWORD", help="Of an encrypted PDF."),
    restart: bool = typer.Option(False, "--restart", help="Convert pages again that an earlier run has finished."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; by default the checkpoint's."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int | None = typer.Option(None, help="CPU threads."),
    quantize: str | None = typer.Option(None, help="int8 or int4 weights."),
) -> None:
    """Convert a document page by page with a Docling checkpoint.

    Finished pages wait in OUTPUT.pages.jsonl: the same command goes on where an interrupted run stopped, and tries
    failed pages again. Exit codes: 0 every page is there, 3 some pages failed and the others are written, 1 none is.
    """
    from smolvlm_fms.documents.convert import PROMPT, ConvertOptions, convert_pages, settings_of
    from smolvlm_fms.documents.pages import open_document, parse_pages
    from smolvlm_fms.documents.sidecar import Sidecar

    wanted = _format(to, output)
    options = ConvertOptions(prompt or PROMPT, max_tokens, batch, detail)
    _check_output(output)
    _check_exporter(wanted)
    with open_document(file, dpi=dpi, password=password) as source:
        numbers = parse_pages(pages, source.count)
        vlm = _load(model, dtype, device, threads, quantize, batch)
        sidecar = None
        if output is not None:
            notes = output.with_name(output.name + ".pages.jsonl")
            if restart:
                notes.unlink(missing_ok=True)
            sidecar = Sidecar(notes, settings_of(vlm, source, options, dpi))
        known = 0 if sidecar is None else len(set(sidecar.done) & set(numbers))
        if known:
            _say(f"{known} of {len(numbers)} pages are there from an earlier run (--restart converts them again)")
        complete = False
        try:
            with _Bar(len(numbers)) as bar:
                found = convert_pages(vlm, source, numbers, options, sidecar=sidecar, on_tokens=bar.tokens)
                results = list(bar.follow(found))
            good = {page.number: page for page in results if not page.failed}
            if not good:
                raise InputError(f"None of the {len(numbers)} pages could be converted: {results[0].message}")
            _write(output, _export(good, source, wanted, file.stem, pictures))
            complete = len(good) == len(numbers)
        finally:
            if sidecar is not None:
                sidecar.close(remove=complete or not sidecar.done)
    if not complete:
        failed = ", ".join(str(page.number) for page in results if page.failed)
        _say(f"pages that failed: {failed}; the others are written. The same command tries them again.")
        raise typer.Exit(INCOMPLETE)


def _format(to: str | None, output: Path | None) -> str:
    from smolvlm_fms.documents.doctags import FORMATS

    wanted = to or SUFFIXES.get(output.suffix.lower() if output else "", "md")
    if wanted not in FORMATS:
        raise InputError(f"--to is {wanted!r}; one of {', '.join(FORMATS)} is possible.")
    return wanted


def _check_output(output: Path | None) -> None:
    """An output that cannot be written should be said before the model is loaded."""
    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        what = "is a folder" if output.is_dir() else "lies in a folder that does not exist"
        raise FetchError(f"{output} {what}; name a file to write.")


def _check_exporter(wanted: str) -> None:
    """The same for docling-core."""
    if wanted != "doctags":
        from smolvlm_fms.documents.doctags import require_docling

        require_docling()


def _load(model: str, dtype: str | None, device: str, threads: int | None, quantize: str | None, batch: int) -> Any:
    import smolvlm_fms as sv

    engine = sv.EngineConfig(max_sequences=batch)
    vlm = sv.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize, engine=engine)
    if not vlm.processor.keep_special_tokens:
        _say(f"{model} is no Docling checkpoint: its answers have no DocTags and become plain text")
    return vlm


def _export(good: dict[int, Any], source: Any, wanted: str, name: str, pictures: bool) -> str:
    from smolvlm_fms.documents.doctags import build_document, export

    texts = {number: page.text for number, page in good.items()}
    if wanted == "doctags":
        return export(texts, None, wanted)
    sizes = {number: page.size for number, page in good.items()}
    picture_of = source.render if pictures else None
    return export(texts, build_document(texts, sizes, name, picture_of=picture_of), wanted)


def _write(output: Path | None, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    if output is None:
        typer.echo(text, nl=False)
        return
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise FetchError(f"{output} cannot be written: {error}") from error


def _say(line: str) -> None:
    typer.secho(line, err=True, dim=True)


class _Bar:
    """Progress on standard error where a person watches; problems with pages are said in any case."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "pages", TimeRemainingColumn())
        self._progress = Progress(
            *columns, TextColumn("{task.fields[tokens]}"), console=console, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("converting", total=total, tokens="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tokens(self, number: int, tokens: int) -> None:
        self._progress.update(self._task, tokens=f"page {number}: {tokens} tokens")

    def follow(self, results: Iterable[Any]) -> Iterable[Any]:
        """Hand on each result, and say what is to be said about it."""
        for page in results:
            self._progress.advance(self._task)
            if page.message:
                _say(f"page {page.number}: {page.status}: {page.message}")
            yield page
