"""``smolvlm ask``: pictures and a question in, the answer out as it is written."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import sys
from pathlib import Path
from typing import Any

import typer

from smolvlm_fms.errors import InputError

VIDEO_SUFFIXES = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg"}


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("ask", help="Ask a question about pictures or a video.", no_args_is_help=True)(ask)


def ask(
    inputs: list[str] = typer.Argument(
        ..., metavar="[IMAGE…] QUESTION", help="Pictures or videos (path, URL, data: URI), then the question."
    ),
    model: str = typer.Option("demo", "--model", "-m", help="A checkpoint folder, a hub id, or 'demo' (bundled)."),
    detail: str = typer.Option("high", help="high: the checkpoint's own rule; auto: fewer tiles; low: one."),
    system: str | None = typer.Option(None, help="A system message before the question."),
    max_tokens: int = typer.Option(512, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, help="0 takes the likeliest token each time."),
    top_k: int = typer.Option(0, help="Choose among that many tokens (0: all)."),
    top_p: float = typer.Option(1.0, help="Choose among the likeliest tokens of that total probability."),
    min_p: float = typer.Option(0.0, help="Leave out tokens below that share of the likeliest one's probability."),
    repetition_penalty: float = typer.Option(1.0, help="Above 1 makes tokens already there less likely."),
    seed: int | None = typer.Option(None, help="The same seed gives the same answer."),
    stop: list[str] = typer.Option([], help="End the answer before this text (may be given several times)."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; by default the checkpoint's."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int | None = typer.Option(None, help="CPU threads."),
    quantize: str | None = typer.Option(None, help="int8 or int4 weights."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output instead of streamed text."),
) -> None:
    *media, question = inputs
    if not question.strip() or (not media and Path(question).is_file()):
        raise InputError(
            f"The last argument is the question; {question!r} came. Write: smolvlm ask photo.jpg 'What is this?'"
        )
    vlm = _load(model, dtype, device, threads, quantize)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop),
        "detail": detail,
    }
    messages = _messages(media, question, system)
    if json:
        typer.echo(jsonlib.dumps(report(vlm.chat(messages, **options)), ensure_ascii=False))
        return
    for piece in vlm.stream_chat(messages, **options):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def report(answer: Any) -> dict[str, Any]:
    """What ``--json`` prints: text, finish_reason, usage, timings, model."""
    fields = dataclasses.asdict(answer)
    return {name: fields[name] for name in ("text", "finish_reason", "usage", "timings", "model")}


def _messages(media: list[str], question: str, system: str | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for item in media:
        kind = "video" if Path(item).suffix.lower() in VIDEO_SUFFIXES else "image"
        where = "url" if "://" in item or item.startswith("data:") else "path"
        parts.append({"type": kind, where: item})
    parts.append({"type": "text", "text": question})
    before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return [*before, {"role": "user", "content": parts}]


def _load(model: str, dtype: str | None, device: str, threads: int | None, quantize: str | None) -> Any:
    """Load with a spinner on standard error where a person watches; pipes and logs see nothing of it."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return _load_quietly(model, dtype, device, threads, quantize)
    with console.status(f"loading {model} …"):
        return _load_quietly(model, dtype, device, threads, quantize)


def _load_quietly(model: str, dtype: str | None, device: str, threads: int | None, quantize: str | None) -> Any:
    import smolvlm_fms as sv

    return sv.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
