"""What a test is made of, and how it is read: JSONL beside its pictures, in a folder or in a zip.

A line is one question in the chat format that transformers uses, with what is right:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "…"}]}],
     "answer": "dog", "kind": "animals"}

``docs/evaluation.md`` describes every form that is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolvlm_fms.bundle import bundled
from smolvlm_fms.errors import FetchError, InputError, PromptError
from smolvlm_fms.evaluation.scoring import METRICS
from smolvlm_fms.processing.chat_template import normalise_conversations

__all__ = ["BUNDLED", "Item", "Suite", "find_suites", "read_suite"]

BUNDLED = (
    "emoji_unseen_art",
    "flags_unseen_set",
    "sketches",
    "shapes",
    "reading_unseen_fonts",
    "charts",
    "two_pictures",
    "video",
)
"""The tests that ship with the package, in the order of the table."""

MAX_TOKENS = 32
_SOURCES = ("path", "url", "base64")


@dataclass(frozen=True)
class Item:
    """One question: messages whose pictures are still names of files, what is right, what sort it is of, and where it
    was read."""

    messages: tuple[dict[str, Any], ...]
    answers: tuple[str, ...]
    kind: str
    place: str

    @property
    def question(self) -> str:
        """The words of the last message."""
        return " ".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")


@dataclass(frozen=True)
class Suite:
    """One test. ``read`` gives the bytes of a file that an item names; ``digest`` changes when the questions do."""

    name: str
    items: tuple[Item, ...]
    read: Callable[[str], bytes]
    digest: str
    metric: str = "exact"
    max_tokens: int = MAX_TOKENS

    def first(self, limit: int | None) -> Suite:
        """The same test with at most ``limit`` of its questions."""
        return replace(self, items=self.items[:limit])


def find_suites(folder: Path | None = None, names: Sequence[str] | None = None) -> list[Suite]:
    """The tests of a folder (every ``NAME.jsonl`` and ``NAME.zip`` in it), or the bundled ones.

    names: only these, in this order. Raises InputError for a name that is not there or a line that is no question,
    FetchError for a folder or file that cannot be read.
    """
    home = bundled("eval") if folder is None else folder
    if not home.is_dir():
        raise FetchError(f"{home} is no folder; a test is a NAME.jsonl (or a NAME.zip that holds one) in a folder.")
    found = {path.stem: path for path in sorted(home.iterdir()) if path.suffix in (".jsonl", ".zip")}
    if not found:
        raise FetchError(f"{home} holds no test, that is no NAME.jsonl and no NAME.zip.")
    if folder is None:
        found = {name: found[name] for name in BUNDLED if name in found}
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise InputError(f"There is no test called {', '.join(map(repr, unknown))}; there are {', '.join(found)}.")
    return [read_suite(found[name]) for name in names or found]


def read_suite(path: Path) -> Suite:
    """One test from its JSONL file or its zip. Raises InputError or FetchError."""
    if path.suffix == ".zip":
        content, read = _open_zip(path)
    else:
        content, read = _bytes(path), lambda name: _bytes(path.parent / name)
    settings: dict[str, Any] = {}
    items: list[Item] = []
    for number, line in enumerate(_text(content, path).splitlines(), 1):
        place = f"{path.name}, line {number}"
        record = _object(line, place)
        if "test" in record and number == 1:
            settings = _settings(record["test"], place)
        else:
            items.append(_item(record, place))
    if not items:
        raise InputError(f"{path} has no questions.")
    return Suite(path.stem, tuple(items), read, hashlib.blake2b(content, digest_size=8).hexdigest(), **settings)


def _open_zip(path: Path) -> tuple[bytes, Callable[[str], bytes]]:
    """The test's lines, and what reads the other files of the zip."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"{path} cannot be read: {error}") from error
    lines = [name for name in archive.namelist() if name.endswith(".jsonl")]
    if len(lines) != 1:
        raise InputError(f"{path} must hold one .jsonl file; it holds {len(lines)}.")

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (KeyError, OSError, zipfile.BadZipFile, RuntimeError) as error:
            raise FetchError(f"{path} has no readable file {name!r}: {error}") from error

    return read(lines[0]), read


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FetchError(f"{path} cannot be read: {error}") from error


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: one JSON object a line is expected; {type(record).__name__} came.")
    return record


def _settings(given: Any, place: str) -> dict[str, Any]:
    """The first line's ``{"test": {…}}``: metric and max_tokens; what else stands there is for readers."""
    if not isinstance(given, dict):
        raise InputError(f"{place}: 'test' is an object with 'metric' and 'max_tokens'; {given!r} came.")
    chosen = {name: given[name] for name in ("metric", "max_tokens") if name in given}
    if chosen.get("metric", "exact") not in METRICS:
        raise InputError(f"{place}: metric {given['metric']!r} is not known; {' and '.join(METRICS)} are.")
    if not isinstance(chosen.get("max_tokens", 1), int) or chosen.get("max_tokens", 1) < 1:
        raise InputError(f"{place}: max_tokens is a whole number from 1 on; {given['max_tokens']!r} came.")
    return chosen


def _item(record: Mapping[str, Any], place: str) -> Item:
    """A question from its record: ``messages``, or ``question`` with ``images`` or ``video``; and ``answer``."""
    if "messages" in record:
        try:
            (messages,), _ = normalise_conversations(record["messages"])
        except (PromptError, ValueError) as error:
            raise InputError(f"{place}: {error}") from error
    elif isinstance(record.get("question"), str):
        messages = [{"role": "user", "content": [*_loose_media(record), {"type": "text", "text": record["question"]}]}]
    else:
        raise InputError(f"{place}: a question has 'messages' or 'question'; it has {', '.join(record) or 'nothing'}.")
    messages = [{**message, "content": _parts(message, place)} for message in messages]
    answer = record.get("answer")
    if answer is None and messages[-1]["role"] == "assistant":
        answer = " ".join(part.get("text", "") for part in messages.pop()["content"])
    answers = [answer] if isinstance(answer, str) else answer
    if not answers or not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        raise InputError(f"{place}: 'answer' is a text, or a list of those that are right; {answer!r} came.")
    if not messages or messages[-1]["role"] != "user":
        raise InputError(f"{place}: the last message must be the user's question.")
    return Item(tuple(messages), tuple(answers), str(record.get("kind", "")), place)


def _loose_media(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    images = record.get("images", record.get("image", []))
    parts = [{"type": "image", "path": path} for path in (images if isinstance(images, list) else [images])]
    rate = {"fps": record["fps"]} if "fps" in record else {}
    return parts + ([{"type": "video", "path": record["video"], **rate}] if "video" in record else [])


def _parts(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """A message's content as parts; every picture or video under ``path`` as a name (or a list of a video's frames)."""
    content = message.get("content", "")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [_media(part, place) if part["type"] in ("image", "video") else dict(part) for part in parts]


def _media(part: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = part["type"]
    where = next((part[key] for key in (kind, *_SOURCES) if part.get(key) is not None), None)
    names = where if isinstance(where, list) and kind == "video" else [where]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{place}: part of type {kind!r} names no file, URL or data: URI; {where!r} came.")
    if part.get("base64") is where:
        where = f"data:;base64,{where}"
    fps = part.get("fps")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf):
        raise InputError(f"{place}: fps is the number of frames that make a second; {fps!r} came.")
    return {"type": kind, "path": where} | ({} if fps is None else {"fps": fps})
