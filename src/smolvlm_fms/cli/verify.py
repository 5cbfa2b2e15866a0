"""``smolvlm verify``: a parity certificate against transformers."""

from __future__ import annotations

import json as jsonlib
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("verify", help="Compare a checkpoint's results with transformers': a parity certificate.")(verify)


def verify(
    model: str = typer.Argument("demo", help="A checkpoint folder, a hub id, or 'demo'."),
    new_tokens: int = typer.Option(24, min=1, help="Greedy tokens to compare in each case."),
    dtype: str = typer.Option("float32", help="float32 or bfloat16."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
    markdown: bool = typer.Option(False, "--markdown", help="A Markdown table on standard output."),
) -> None:
    from rich.console import Console

    from smolvlm_fms.hf import verify as run

    with Console(stderr=True).status("starting") as status:
        report = run(model, new_tokens, dtype, progress=status.update)
    if json:
        typer.echo(jsonlib.dumps(report))
    elif markdown:
        from smolvlm_fms.hf.certificate_table import checks_table

        typer.echo(checks_table(report))
    else:
        _show(report)
    raise typer.Exit(0 if report["ok"] else 1)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "max |difference|", "bound", "reference's noise", "agree", "")
    for check in report["checks"]:
        mark = "[green]ok[/]" if check["ok"] else "[red]differs[/]"
        noise = "" if check["reference_noise"] is None else f"{check['reference_noise']:.1e}"
        table.add_row(
            check["name"], f"{check['max_abs']:.1e}", f"{check['bound']:.1e}", noise, f"{check['agree']:.4f}", mark
        )
    console = Console()
    console.print(table)
    for left in report["skipped"]:
        console.print(f"not compared: {left['name']}: {left['reason']}", style="yellow")
    facts = [f"{name} {value}" for name, value in report["versions"].items()]
    console.print(", ".join([*facts, f"{report['threads']} threads", f"{report['seconds']} s"]), style="dim")
    console.print("[green]transformers' results[/]" if report["ok"] else "[red]NOT transformers' results[/]")
