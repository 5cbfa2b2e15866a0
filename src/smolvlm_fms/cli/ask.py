"""``smolvlm ask``: pictures and a question in, the answer out as it is written."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import sys
from pathlib import Path
from typing import Any

import typer

from smolvlm_fms.cli.options import (
    Detail,
    Device,
    Dtype,
    Json,
    MaxTokens,
    Model,
    Quantize,
    QuantizeTower,
    Temperature,
    Threads,
    load,
)
from smolvlm_fms.errors import InputError

VIDEO_SUFFIXES = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg"}


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("ask", help="Ask a question about pictures or a video.", no_args_is_help=True)(ask)


def ask(
    inputs: list[str] = typer.Argument(
        ..., metavar="[IMAGE…] QUESTION", help="Pictures or videos (path, URL, data: URI), then the question."
    ),
    model: Model = "demo",
    detail: Detail = "high",
    system: str | None = typer.Option(None, help="A system message before the question."),
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: int = typer.Option(0, help="Choose among that many tokens (0: all)."),
    top_p: float = typer.Option(1.0, help="Choose among the likeliest tokens of that total probability."),
    min_p: float = typer.Option(0.0, help="Leave out tokens below that share of the likeliest one's probability."),
    repetition_penalty: float = typer.Option(1.0, help="Above 1 makes tokens already there less likely."),
    seed: int | None = typer.Option(None, help="The same seed gives the same answer."),
    stop: list[str] = typer.Option([], help="End the answer before this text (may be given several times)."),
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    quantize: Quantize = None,
    quantize_tower: QuantizeTower = None,
    json: Json = False,
) -> None:
    *media, question = inputs
    if not question.strip() or (not media and Path(question).is_file()):
        raise InputError(
            f"The last argument is the question; {question!r} came. Write: smolvlm ask photo.jpg 'What is this?'"
        )
    vlm = load(model, dtype, device, threads, quantize, quantize_tower)
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
    messages = conversation(media, question, system)
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


def conversation(media: list[str], question: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages in the chat format: pictures and videos first, then the text."""
    parts: list[dict[str, Any]] = []
    for item in media:
        kind = "video" if Path(item).suffix.lower() in VIDEO_SUFFIXES else "image"
        where = "url" if "://" in item or item.startswith("data:") else "path"
        parts.append({"type": kind, where: item})
    parts.append({"type": "text", "text": question})
    before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return [*before, {"role": "user", "content": parts}]
