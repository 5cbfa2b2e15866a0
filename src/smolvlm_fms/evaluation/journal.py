"""Answers on disk, so that a run that was stopped goes on where it was.

The first line says whose answers they are; every further one is an answer:

    {"model": "demo", "checkpoint": "…", "options": {…}}
    {"skill": "charts", "test": "…", "number": 0, "blank": false, "question": "…", "answers": ["7"], "said": "7", …}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from smolvlm_fms.errors import FetchError, InputError
from smolvlm_fms.evaluation.scoring import mark
from smolvlm_fms.evaluation.suite import Suite

__all__ = ["Journal", "fingerprint"]

_PROBES = 16
_PROBE_BYTES = 65536


class Journal:
    """What was said to which question. Without a ``path`` it remembers, but writes nothing."""

    def __init__(self, path: Path | None = None, header: dict[str, Any] | None = None) -> None:
        """Open or begin a file. Raises InputError where it holds another checkpoint's or no answers at all,
        FetchError where it cannot be read or written."""
        self.path = path
        self._said: dict[tuple[str, str, int, bool], str] = {}
        self._file: Any = None
        if path is None:
            return
        header = header or {}
        try:
            old = path.read_bytes() if path.exists() else b""
            whole = old[: old.rfind(b"\n") + 1]
            if whole:
                self._read(whole.decode("utf-8", "replace"), header)
            self._file = path.open("ab")
            self._file.truncate(len(whole))  # a line that a killed run left unfinished is written anew
            if not whole:
                self._write(header)
        except OSError as error:
            raise FetchError(f"{path} cannot be used to save answers: {error}") from error

    def _read(self, text: str, header: dict[str, Any]) -> None:
        try:
            first, *rest = [json.loads(line) for line in text.splitlines()]
            self._said = {(row["skill"], row["test"], row["number"], row["blank"]): row["said"] for row in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} holds no saved answers: {error!r}. Choose another file.") from error
        if first != header:
            raise InputError(
                f"{self.path} holds the answers of another checkpoint, or with other options: {first}; this run is "
                f"{header}. Choose another file, or delete it."
            )

    def answer(self, suite: Suite, number: int, blank: bool) -> str | None:
        """What was said to this question before, if it was asked."""
        return self._said.get((suite.name, suite.digest, number, blank))

    def add(self, suite: Suite, number: int, blank: bool, said: str) -> None:
        """Keep an answer."""
        self._said[suite.name, suite.digest, number, blank] = said
        if self._file is None:
            return
        item = suite.items[number]
        marked = mark(suite.metric, said, item.answers)
        row = {
            "skill": suite.name,
            "test": suite.digest,
            "number": number,
            "blank": blank,
            "kind": item.kind,
            "question": item.question,
            "answers": list(item.answers),
            "said": said,
            "points": marked.points,
            "of": marked.of,
        }
        self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
        self._file.flush()

    @property
    def count(self) -> int:
        """Answers that it holds."""
        return len(self._said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def fingerprint(folder: Path) -> str:
    """A short digest of a checkpoint: its configuration, and its weights at some places (training changes all)."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".json":
                digest.update(file.read())
                continue
            for probe in range(_PROBES):
                file.seek(size * probe // _PROBES)
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()
