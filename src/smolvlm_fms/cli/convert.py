"""``smolvlm convert``: a model in other software's format, compared with its source before it is there."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from smolvlm_fms.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("convert", help="Write a model in another format, and check that it computes the same.")(convert)


def convert(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, 'demo', a training run, an adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="hf (transformers), fms, gguf (llama.cpp) or onnx.")],
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4 weights: with hf (our engine's own) and gguf.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A LoRA adapter (or its training run) to merge.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the model's.")] = None,
    check_tower: Annotated[
        bool, typer.Option("--check-tower", help="With hf: what would an int8 vision tower cost?")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
    json: Json = False,
) -> None:
    from rich.console import Console

    from smolvlm_fms.export import convert as run

    console = Console(stderr=True)
    options: dict[str, Any] = {
        "quantize": quantize, "adapter": adapter, "dtype": dtype, "force": force, "check_tower": check_tower,
    }  # fmt: skip
    if console.is_terminal:
        with console.status("starting") as status:
            result = run(model, out, to, **options, say=status.update)
    else:
        result = run(model, out, to, **options)
    if json:
        import dataclasses

        typer.echo(jsonlib.dumps(dataclasses.asdict(result)))
    else:
        _print(result)
    raise typer.Exit(0 if result.ok else 1)


def _print(result: Any) -> None:
    for name, size in result.files.items():
        typer.echo(f"{size / 1e6:10.1f} MB  {name}")
    for check in result.checks:
        measured = "" if check.max_abs is None else f"max |difference| {check.max_abs:.1e}, "
        note = f" ({check.note})" if check.note else ""
        typer.echo(f"{'ok' if check.ok else 'FAILED':>6}  {check.name}: {measured}agree {check.agree:.2%}{note}")
    if result.ok:
        typer.echo(f"written to {result.out} in {result.seconds:.1f} s")
    else:
        typer.echo(f"NOT written: {result.out} would not compute what {result.model} does", err=True)
