"""``smolvlm verify``: a parity certificate against transformers."""

from __future__ import annotations

import json as jsonlib

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("verify", help="Compare a checkpoint's results with transformers': a parity certificate.")(verify)


def verify(
    model: str = typer.Argument("demo", help="A checkpoint folder, a hub id, or 'demo'."),
    new_tokens: int = typer.Option(24, help="Greedy tokens to compare in each case."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    from smolvlm_fms.hf import verify as run

    report = run(model, new_tokens)
    if json:
        typer.echo(jsonlib.dumps(report))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("check", "max |difference|", "agree", "")
        for check in report["checks"]:
            mark = "[green]ok[/]" if check["ok"] else "[red]differs[/]"
            table.add_row(check["name"], f"{check['max_abs']:.1e}", f"{check['agree']:.4f}", mark)
        console = Console()
        console.print(table)
        console.print(", ".join(f"{name} {value}" for name, value in report["versions"].items()), style="dim")
        console.print("[green]identical within fp32 rounding[/]" if report["ok"] else "[red]NOT identical[/]")
    raise typer.Exit(0 if report["ok"] else 1)
