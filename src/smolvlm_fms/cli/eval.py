"""``smolvlm eval``: held-out tests for any checkpoint, beside a grey picture."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from smolvlm_fms.cli.options import Detail, Device, Dtype, Json, Quantize, QuantizeTower, Threads, load

if TYPE_CHECKING:
    from smolvlm_fms.evaluation.journal import Journal


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("eval", help="Run the held-out tests, each beside a grey picture, and print a table.")(evaluate)


def evaluate(
    model: str = typer.Argument("demo", metavar="MODEL", help="A checkpoint folder, a hub id, or 'demo' (bundled)."),
    skills: str | None = typer.Option(None, help="Only these tests, by name: shapes,charts."),
    data: Path | None = typer.Option(None, help="A folder of your own tests in place of the bundled ones."),
    limit: int | None = typer.Option(None, min=1, help="At most so many questions a test."),
    blank: bool = typer.Option(True, help="Also ask with grey pictures: what the model knows without looking."),
    save: Path | None = typer.Option(None, help="Keep every answer in this JSONL; the same command again goes on."),
    detail: Detail = "high",
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    quantize: Quantize = None,
    quantize_tower: QuantizeTower = None,
    json: Json = False,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from smolvlm_fms.evaluation.report import as_object, as_table
    from smolvlm_fms.evaluation.run import evaluate as run
    from smolvlm_fms.evaluation.suite import find_suites

    names = [name.strip() for name in skills.split(",") if name.strip()] if skills is not None else None
    suites = [suite.first(limit) for suite in find_suites(data, names)]
    tower = {"quantize_tower": quantize_tower} if quantize_tower else {}
    journal = _journal(save, model, {"detail": detail, "dtype": dtype, "quantize": quantize, **tower})
    vlm = load(model, dtype, device, threads, quantize, quantize_tower)
    errors = Console(stderr=True)
    outcomes = []
    try:
        with journal, Progress(console=errors, transient=True, disable=not errors.is_terminal) as bars:
            bar = bars.add_task("", total=(1 + blank) * sum(len(suite.items) for suite in suites))
            for outcome in run(
                vlm, suites, blank=blank, journal=journal, advance=lambda: bars.advance(bar), detail=detail
            ):
                outcomes.append(outcome)
                bars.update(bar, description=f"{outcome.name} done")
    except KeyboardInterrupt:
        if save:
            typer.echo(f"Stopped; {journal.count} answers are in {save}. The same command goes on.", err=True)
        raise
    for failed in (outcome for outcome in outcomes if outcome.error):
        typer.secho(f"{failed.name} could not be run: {failed.error}", err=True, fg="yellow")
    if json:
        typer.echo(jsonlib.dumps(as_object(model, outcomes), ensure_ascii=False))
    else:
        Console().print(as_table(model, outcomes))
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(3)


def _journal(path: Path | None, model: str, options: dict[str, str | None]) -> Journal:
    """The file of answers, marked with whose they are; one that only remembers where none was asked for."""
    from smolvlm_fms.bundle import folder_of
    from smolvlm_fms.evaluation.journal import Journal, fingerprint

    if path is None:
        return Journal()
    from smolvlm_fms.fms_bridge.loading import resolve_folder

    return Journal(
        path, {"model": model, "checkpoint": fingerprint(resolve_folder(folder_of(model))), "options": options}
    )
