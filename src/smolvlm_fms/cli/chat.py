"""``smolvlm chat``: a conversation in the terminal. Pictures and earlier turns are not computed again."""

from __future__ import annotations

import sys
from typing import Any

import typer

from smolvlm_fms.cli.ask import conversation
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
from smolvlm_fms.errors import SmolVLMError

HELP = "/image PATH adds a picture to the next message, /reset starts again, /quit (or end of input) leaves."


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("chat", help=f"Talk about pictures in the terminal. {HELP}")(chat)


def chat(
    images: list[str] = typer.Argument(None, metavar="[IMAGE…]", help="Pictures or videos of the first message."),
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
    vlm = load(model, dtype, device, threads, quantize, quantize_tower)
    watched = sys.stdin.isatty()
    if watched:
        typer.echo(HELP, err=True)
    messages: list[dict[str, Any]] = []
    waiting = list(images or [])
    while (line := _read(watched)) is not None:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        if command == "/reset":
            messages, waiting = [], []
        elif command == "/image":
            waiting.append(rest.strip())
        elif line:
            turn = [*messages, *conversation(waiting, line)]
            answer = _answer(vlm, turn, detail, max_tokens, temperature)
            waiting = []
            if answer is not None:
                messages = [*turn, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def _read(watched: bool) -> str | None:
    """The next line, stripped; None at the end of input."""
    try:
        return input("> " if watched else "").strip()
    except EOFError:
        return None


def _answer(vlm: Any, messages: list[dict[str, Any]], detail: str, max_tokens: int, temperature: float) -> str | None:
    """Stream the answer. A message that cannot be answered is reported, forgotten, and the conversation goes on."""
    try:
        stream = vlm.stream_chat(messages, detail=detail, max_tokens=max_tokens, temperature=temperature)
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except SmolVLMError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        return None
    sys.stdout.write("\n")
    text: str = stream.answer.text
    return text
