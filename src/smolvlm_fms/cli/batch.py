"""``smolvlm batch``: questions of a JSONL file to answers in another, several at once; goes on where it stopped."""

from __future__ import annotations

import functools
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from smolvlm_fms.cli.ask import conversation, report
from smolvlm_fms.cli.options import (
    Detail,
    Device,
    Dtype,
    MaxTokens,
    Model,
    Quantize,
    QuantizeTower,
    Temperature,
    Threads,
    load,
)
from smolvlm_fms.errors import FetchError, InputError, SmolVLMError


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("batch", help="Answer the questions of a JSONL file; the same command again goes on.")(batch)


def batch(
    source: Path = typer.Argument(
        ..., help='One object a line: {"images": ["a.jpg"], "question": "…"} or {"messages": […]}.'
    ),
    output: Path = typer.Option(
        ..., "--output", "-o", help="Answers, one object a line, in the order of the questions."
    ),
    model: Model = "demo",
    detail: Detail = "high",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    quantize: Quantize = None,
    quantize_tower: QuantizeTower = None,
) -> None:
    from rich.progress import track

    questions = list(_questions(source))
    done = _finished(output)
    if done > len(questions):
        raise InputError(f"{output} has {done} answers to {len(questions)} questions; is it another file's?")
    vlm = load(model, dtype, device, threads, quantize, quantize_tower)
    options = {"detail": detail, "max_tokens": max_tokens, "temperature": temperature}
    failed = 0
    with output.open("a", encoding="utf-8") as sink:
        answers = _answers(vlm, questions[done:], options)
        for result in track(answers, "answering", total=len(questions) - done, disable=not sys.stderr.isatty()):
            failed += "error" in result
            sink.write(json.dumps(result, ensure_ascii=False) + "\n")
            sink.flush()
    if failed:
        typer.secho(f"{failed} of {len(questions)} could not be answered; their lines have an 'error'.", err=True)
        raise typer.Exit(3)


def _answers(vlm: Any, questions: list[Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Results in order, as many questions at once as the engine has places. A failed one has an 'error'."""

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except SmolVLMError as error:
            return {"error": str(error)}

    def finish(started: Any) -> dict[str, Any]:
        if isinstance(started, dict):
            return started
        result: dict[str, Any] = attempt(lambda: report(started.finish()))
        return result

    window: deque[Any] = deque()
    for messages in questions:
        window.append(attempt(functools.partial(vlm.stream_chat, messages, **options)))
        if len(window) >= vlm.engine.config.max_sequences:
            yield finish(window.popleft())
    while window:
        yield finish(window.popleft())


def _questions(source: Path) -> Iterator[list[dict[str, Any]]]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FetchError(f"{source} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            if "messages" in item:
                yield item["messages"]
            else:
                images = item.get("images", [])
                yield conversation([images] if isinstance(images, str) else images, item["question"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{source}, line {number}: not an object with 'question' (and 'images') or 'messages': {error!r}"
            ) from error


def _finished(output: Path) -> int:
    """Answers already there. A line that a killed run left unfinished is cut off."""
    if not output.exists():
        return 0
    text = output.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        output.write_bytes(whole)
    return whole.count(b"\n")
