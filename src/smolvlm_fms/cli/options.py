"""Options that several commands share, and how they load a model."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

__all__ = [
    "Detail",
    "Device",
    "Dtype",
    "Json",
    "MaxTokens",
    "Model",
    "Quantize",
    "QuantizeTower",
    "Temperature",
    "Threads",
    "load",
]

Model = Annotated[str, typer.Option("--model", "-m", help="A checkpoint folder, a hub id, or 'demo' (bundled).")]
Detail = Annotated[str, typer.Option(help="high: the checkpoint's own rule; auto: fewer tiles; low: one.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Quantize = Annotated[str | None, typer.Option(help="int8 or int4 weights.")]
QuantizeTower = Annotated[
    str | None, typer.Option(help="int8 for the vision tower, too: quicker; convert --check-tower tells its cost.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def load(
    model: str,
    dtype: str | None,
    device: str,
    threads: int | None,
    quantize: str | None,
    quantize_tower: str | None = None,
) -> Any:
    """Load with a spinner on standard error where a person watches; pipes and logs see nothing of it."""
    from rich.console import Console

    import smolvlm_fms as sv

    console = Console(stderr=True)
    status = console.status(f"loading {model} …") if console.is_terminal else contextlib.nullcontext()
    with status:
        return sv.load(
            model, dtype=dtype, device=device, threads=threads, quantize=quantize, quantize_tower=quantize_tower
        )
