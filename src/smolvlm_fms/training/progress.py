"""What a run says while it goes on: metrics.jsonl, samples.jsonl and the bar."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smolvlm_fms.training.checkpoint import write_atomically

__all__ = ["Bar", "JsonLines"]

logger = logging.getLogger(__name__)


class JsonLines:
    """One JSON object a line. Lines that the disk refuses are kept and written as soon as it takes them."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Lines of steps after ``after_step`` come from a run that died; they are dropped, to be written again."""
        self.path = path
        self.waiting: list[str] = []
        if path.exists():
            write_atomically(path, "".join(f"{line}\n" for line in self._lines() if _step(line) <= after_step))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object."""
        self.waiting.append(json.dumps(dict(record), ensure_ascii=False))
        try:
            before = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in self.waiting))
            except OSError:
                with self.path.open("r+b") as file:  # what part of the lines got through would be written twice
                    file.truncate(before)
                raise
            self.waiting.clear()
        except OSError as error:
            logger.warning("%s: %s. %d lines wait for room.", self.path, error.strerror, len(self.waiting))

    def _lines(self) -> list[str]:
        return [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) >= 0]


def _step(line: str) -> int:
    """The step of a line; −1 for a line that was cut when the process died."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class Bar:
    """A progress bar on a terminal; elsewhere a line every half minute."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.steps = steps
        self.shown = shown
        self.last = 0.0
        self.began = (done, time.monotonic())
        console = Console(stderr=True)
        self.progress: Progress | None = None
        if shown and console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            self.progress = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.progress.add_task("", total=steps, completed=done)
            self.progress.start()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the newest metrics."""
        if not self.shown:
            return
        text = describe(metrics)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.last > 30 or step == self.steps:
            self.last = time.monotonic()
            left = self._left(step)
            print(f"step {step}/{self.steps}  {text}  {left} left", file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        """Time to the last step at the pace so far."""
        done, since = self.began
        seconds = (time.monotonic() - since) / max(1, step - done) * (self.steps - step)
        return str(timedelta(seconds=round(seconds)))

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()


def describe(metrics: Mapping[str, Any]) -> str:
    """The newest metrics in one line."""
    parts = [f"loss {metrics['loss']:.3f}"]
    for name, unit in (("samples_per_s", "samples/s"), ("tokens_per_s", "tok/s")):
        if name in metrics:
            parts.append(f"{metrics[name]:,.0f} {unit}" if metrics[name] >= 10 else f"{metrics[name]:.1f} {unit}")
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.0%}")
    if "memory_gib" in metrics:
        parts.append(f"{metrics['memory_gib']:.1f} GiB")
    return "  ".join(parts)
