"""``smolvlm inspect``: how a picture is cut into tiles, and what it costs."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("inspect", help="Show how a picture is cut into tiles, and what it costs.")(inspect)


def inspect(
    image: str = typer.Argument(..., help="A picture: path, URL or data: URI."),
    model: str = typer.Option("demo", "--model", "-m", help="Whose rule: a checkpoint folder, a hub id, or 'demo'."),
    detail: str = typer.Option(
        "high", help="high: the checkpoint's own rule; auto: as many as it has pixels; low: one."
    ),
    save: Path | None = typer.Option(None, help="Write the picture with its tile grid drawn on it."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    from smolvlm_fms.processing.inspection import inspect_picture

    report = inspect_picture(image, _folder(model), detail=detail, save=save)
    if json:
        typer.echo(jsonlib.dumps(report))
        return
    tiles, (width, height) = report["tiles"], report["resized"]
    grid = f"{tiles['rows']} rows × {tiles['cols']} columns + overview" if tiles["rows"] else "one frame, not cut"
    lines = {
        "picture": f"{report['size'][0]} × {report['size'][1]} pixels",
        "resized": f"{width} × {height}",
        "tiles": f"{tiles['count']} of {report['tile_size']} × {report['tile_size']} ({grid})",
        "image tokens": f"{report['image_tokens']} ({report['tokens_per_tile']} a tile)",
        "cost": f"about {report['gflop']:.3g} GFLOP in the vision tower",
        "prompt": report["prompt"] if len(report["prompt"]) < 200 else report["prompt"][:200] + "…",
    }
    for name, value in lines.items():
        typer.echo(f"{name:>13}  {value!r}" if name == "prompt" else f"{name:>13}  {value}")
    if save:
        typer.echo(f"{'written':>13}  {save}")


def _folder(model: str) -> Path:
    """A folder with the checkpoint's configuration. Only a hub id needs the (slow to import) loader."""
    from smolvlm_fms.bundle import folder_of

    folder = Path(folder_of(model)).expanduser()
    if folder.is_dir():
        return folder
    from smolvlm_fms.fms_bridge.loading import resolve_folder

    return resolve_folder(model)
