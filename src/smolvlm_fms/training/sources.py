"""Where conversations come from: JSONL, parquet, WebDataset shards, folders and streams of ``datasets``.

A ``Source`` of finite size gives any record by number. A stream gives them in order only; to come back to a place it
is read again from the start. Kinds are told by the path, or by ``kind`` in the configuration:

    *.jsonl            one object a line
    *.parquet          or a folder of them; pictures as {"bytes": …, "path": …} or plain bytes
    *.tar              WebDataset shards (``{00..07}`` and globs are expanded): KEY.json and KEY.jpg, KEY.1.png …
    datasets           a folder that ``Dataset.save_to_disk`` wrote, or anything that ``load_dataset`` takes
    stream             the same through ``load_dataset(…, streaming=True)``
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from smolvlm_fms.errors import ConfigurationError, FetchError, InputError, MissingDependencyError
from smolvlm_fms.training.config import SourceConfig
from smolvlm_fms.training.conversation import Conversation, read_record

__all__ = ["Source", "Stream", "open_source"]

Indices = npt.NDArray[np.int64]

VIDEOS = {"mp4", "m4v", "webm", "mkv", "mov", "avi", "mpg", "mpeg"}
"""Extensions of videos in tar shards; everything else is a picture."""


@runtime_checkable
class Source(Protocol):
    """A finite set of conversations. ``blocks``: where parts begin that are cheap to read together (0 first)."""

    name: str
    blocks: list[int]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Conversation:
        """Conversation ``index``; raises InputError, PromptError or FetchError."""
        ...


class Stream:
    """Conversations of a streamed data set, in the order in which they come, again and again."""

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.path
        self.folder = _base(config)
        self._dataset = _load_dataset(config, streaming=True)

    def records(self, start: int, once: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Names and records number ``start``, ``start + 1``, …; those before are read and passed over.

        At the stream's end it begins anew, unless ``once``.
        """
        number = 0
        while True:
            first = number
            for record in self._dataset:
                if number >= start:
                    yield f"{self.name}#{number}", record
                number += 1
            if number == first:
                raise InputError(f"The stream {self.name} is empty.")
            if once:
                return

    def understand(self, name: str, record: Mapping[str, Any]) -> Conversation:
        """The conversation in a record; raises InputError or PromptError."""
        return read_record(_without_none(record), self.folder, name)


class JsonLines:
    """One JSON object a line; the file is indexed by line starts and read where needed."""

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.path
        self.path = Path(config.path)
        self.folder = _base(config)
        self.blocks = [0]
        self._spans: list[tuple[int, int]] = []
        place = 0
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._spans.append((place, len(line)))
                place += len(line)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, index: int) -> Conversation:
        start, size = self._spans[index]
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(size)
        name = f"{self.name}:{index + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{name}: not JSON: {error}.") from None
        if not isinstance(record, dict):
            raise InputError(f"{name}: a record is a JSON object, not a {type(record).__name__}.")
        return read_record(record, self.folder, name)


class Parquet:
    """Rows of parquet files; a few row groups stay in memory."""

    kept = 4

    def __init__(self, config: SourceConfig) -> None:
        parquet = _library("pyarrow.parquet")
        self.name = config.path
        path = Path(config.path)
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise FetchError(f"The folder {path} holds no *.parquet files.")
        self.folder = _base(config)
        self._groups: list[tuple[Path, int]] = []
        counts = []
        for file in self.files:
            metadata = parquet.ParquetFile(file).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                counts.append(metadata.row_group(group).num_rows)
        self.blocks = [0, *accumulate(counts)][:-1]
        self._count: int = sum(counts)
        self._read: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": OrderedDict()}  # workers read their own row groups

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Conversation:
        group = bisect_right(self.blocks, index) - 1
        if group not in self._read:
            file, number = self._groups[group]
            self._read[group] = _library("pyarrow.parquet").ParquetFile(file).read_row_group(number)
            if len(self._read) > self.kept:
                self._read.popitem(last=False)
        self._read.move_to_end(group)
        row = self._read[group].slice(index - self.blocks[group], 1).to_pylist()[0]
        return read_record(_without_none(row), self.folder, f"{self.name}[{index}]")


class Shards:
    """WebDataset tar shards, indexed by their headers: KEY.json beside KEY.jpg, KEY.mp4, or KEY.0.png, KEY.1.png …

    KEY.txt in place of KEY.json is a caption: the picture or video is described without being asked.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.path
        self.folder = _base(config)
        self._samples: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []
        self.blocks = []
        for shard in _expand(config.path):
            self.blocks.append(len(self._samples))
            self._samples += _members(shard)

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> Conversation:
        shard, key, places = self._samples[index]
        found: dict[str, bytes] = {}
        with shard.open("rb") as file:
            for extension, (start, size) in places.items():
                file.seek(start)
                found[extension] = file.read(size)
        name = f"{shard}#{key}"
        try:
            if "json" in found:
                record = json.loads(found.pop("json"))
            elif "txt" in found:
                words = found.pop("txt").decode("utf-8").strip()
                what = "video" if any(_is_video(extension) for extension in found) else "picture"
                asked = {"role": "user", "content": [{"type": "text", "text": f"Describe the {what}."}]}
                record = {"messages": [asked, {"role": "assistant", "content": words}]}
            else:
                raise InputError(f"{name}: there is no KEY.json or KEY.txt; only {', '.join(sorted(found))}.")
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        media: dict[str, list[bytes]] = {}
        for extension in sorted(found, key=_natural):
            media.setdefault("videos" if _is_video(extension) else "images", []).append(found[extension])
        return read_record({**record, **media}, self.folder, name)


class Rows:
    """A data set of the ``datasets`` library, memory-mapped from its folder or cache."""

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.path
        self.folder = _base(config)
        self.blocks = [0]
        self._dataset = _load_dataset(config, streaming=False)

    def __len__(self) -> int:
        count: int = len(self._dataset)
        return count

    def read(self, index: int) -> Conversation:
        return read_record(_without_none(self._dataset[index]), self.folder, f"{self.name}[{index}]")


def open_source(config: SourceConfig) -> Source | Stream:
    """Open one source of the configuration; raises ConfigurationError or FetchError where that cannot be done."""
    path, kind = config.path, config.kind or _kind(config.path)
    kinds = {"jsonl": JsonLines, "parquet": Parquet, "webdataset": Shards, "datasets": Rows, "stream": Stream}
    if kind in ("jsonl", "parquet") and not Path(path).exists():
        raise FetchError(f"The data file {path} does not exist.")
    try:
        opened: Any = kinds[kind](config)
    except OSError as error:
        raise FetchError(f"The data in {path} cannot be read: {error}") from error
    if not isinstance(opened, Stream) and not len(opened):
        raise FetchError(f"{path} holds no records.")
    return opened  # type: ignore[no-any-return]


def order(source: Source, epoch: int, seed: int) -> Indices:
    """Every index of ``source`` once, shuffled: blocks first, then within runs of four blocks, for locality's sake."""
    random = np.random.default_rng((seed, epoch))
    edges = [*source.blocks, len(source)]
    blocks = [np.arange(edges[i], edges[i + 1], dtype=np.int64) for i in random.permutation(len(edges) - 1)]
    runs = [np.concatenate(blocks[i : i + 4]) for i in range(0, len(blocks), 4)]
    return np.concatenate([random.permutation(run) for run in runs])


def _kind(path: str) -> str:
    if path.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if path.endswith(".parquet") or (Path(path).is_dir() and any(Path(path).glob("*.parquet"))):
        return "parquet"
    if path.endswith(".tar"):
        return "webdataset"
    if Path(path).is_dir():
        return "datasets"
    raise ConfigurationError(
        f"What kind of data is {path!r}? Give kind: jsonl, parquet, webdataset, datasets or stream."
    )


def _base(config: SourceConfig) -> Path:
    """Where relative paths of pictures start."""
    if config.images is not None:
        return Path(config.images).expanduser()
    path = Path(config.path)
    return path if path.is_dir() else path.parent


def _expand(pattern: str) -> list[Path]:
    """Shards of a pattern such as ``data-{000..007}.tar`` or ``data-*.tar``, in order."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is not None:
        first, last = match.groups()
        numbers = range(int(first), int(last) + 1)
        names = [pattern[: match.start()] + str(n).zfill(len(first)) + pattern[match.end() :] for n in numbers]
    else:
        names = sorted(glob.glob(pattern))
    missing = [name for name in names if not Path(name).is_file()]
    if missing or not names:
        raise FetchError(f"There is no shard {missing[0] if missing else pattern}.")
    return [Path(name) for name in names]


def _members(shard: Path) -> list[tuple[Path, str, dict[str, tuple[int, int]]]]:
    """Samples of a shard: key, and where each file's bytes lie."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, file = member.name.rpartition("/")
                    key, _, extension = file.partition(".")
                    samples.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = (
                        member.offset_data, member.size,
                    )  # fmt: skip
    except tarfile.TarError as error:
        raise FetchError(f"The shard {shard} is no uncompressed tar file, or damaged: {error}") from error
    return [(shard, key, places) for key, places in samples.items()]


def _load_dataset(config: SourceConfig, streaming: bool) -> Any:
    datasets = _library("datasets")
    path = Path(config.path)
    if not streaming and path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = datasets.load_from_disk(str(path))
    else:
        loaded = datasets.load_dataset(config.path, config.subset, split=config.split, streaming=streaming)
    if isinstance(loaded, Mapping):
        if config.split not in loaded:
            raise ConfigurationError(f"{path} has no split {config.split!r}; it has {', '.join(loaded)}.")
        loaded = loaded[config.split]
    kinds = [kind for name in ("Image", "Video") if (kind := getattr(datasets, name, None)) is not None]
    for column, feature in (loaded.features or {}).items():
        # Pictures and videos stay bytes until a worker decodes them.
        for kind in kinds:
            if isinstance(feature, kind):
                loaded = loaded.cast_column(column, kind(decode=False))
            elif isinstance(getattr(feature, "feature", None), kind):
                loaded = loaded.cast_column(column, datasets.List(kind(decode=False)))
    return loaded


def _without_none(row: Any) -> Any:
    """A row without the None fields that columnar files give to every part of a message."""
    if isinstance(row, Mapping):
        return {key: _without_none(value) for key, value in row.items() if value is not None}
    return [_without_none(value) for value in row] if isinstance(row, list) else row


def _is_video(extension: str) -> bool:
    return extension.rpartition(".")[2] in VIDEOS


def _natural(extension: str) -> tuple[int, str]:
    first = extension.partition(".")[0]
    return (int(first) if first.isdigit() else -1, extension)


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingDependencyError(f"Reading this data needs {package}: pip install 'smolvlm-fms[train]'.") from error
