"""Finished pages beside the output file, so that an interrupted conversion goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from smolvlm_fms.errors import FetchError

__all__ = ["PageResult", "Sidecar"]


@dataclass(frozen=True)
class PageResult:
    """One page: what the model wrote, and how it ended.

    status: ``"done"``, ``"length"`` (the token budget is used up), ``"loop"`` (the model repeated itself and was
    stopped), ``"plain"`` (text without any DocTags) or ``"failed"``, of which ``message`` says why. size: width and
    height in points (PDF) or pixels. tokens: generated ones.
    """

    number: int
    status: str
    text: str = ""
    size: tuple[float, float] = (1.0, 1.0)
    tokens: int = 0
    seconds: float = 0.0
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "failed"


class Sidecar:
    """A file of one JSON object a line: first the settings that the pages belong to, then each page as it is done.

    Every line is on disk before the next page is waited for. A file of other settings, or a damaged one, is begun
    anew; a last line that was cut by a crash is dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises FetchError where the file cannot be read or written."""
        self.path = path
        self.done: dict[int, PageResult] = {}
        head = json.dumps(settings, sort_keys=True)
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            if lines and lines[0] == head:
                self.done = _pages(lines[1:])
            self._file: IO[str] = path.open("w", encoding="utf-8")
            self._write(head)
            for page in self.done.values():
                self._write(json.dumps(dataclasses.asdict(page)))
        except (OSError, UnicodeDecodeError) as error:
            raise FetchError(f"{path}, the notes about finished pages, cannot be used: {error}") from error

    def add(self, page: PageResult) -> None:
        """Note a page. Failed ones are left out, so that the next run tries them again."""
        if not page.failed:
            self.done[page.number] = page
            self._write(json.dumps(dataclasses.asdict(page)))

    def close(self, *, remove: bool) -> None:
        """Close the file; with ``remove``, nothing is left to go on with."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


def _pages(lines: list[str]) -> dict[int, PageResult]:
    found = {}
    for line in lines:
        try:
            fields = json.loads(line)
            page = PageResult(**{**fields, "size": tuple(fields["size"])})
        except (ValueError, TypeError, KeyError):
            break
        found[page.number] = page
    return found
