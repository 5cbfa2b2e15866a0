"""What a run would see, found out before its first step: lengths, budgets, and what is left out and why."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from smolvlm_fms.errors import ConfigurationError, SmolVLMError, TrainingError
from smolvlm_fms.training.batches import read_ahead
from smolvlm_fms.training.checkpoint import write_atomically
from smolvlm_fms.training.config import DataConfig, SourceConfig
from smolvlm_fms.training.conversation import Encoder, Measure
from smolvlm_fms.training.plan import Measured, Plan
from smolvlm_fms.training.sources import Source, Stream, open_source

__all__ = ["Report", "SourceReport", "preflight"]

logger = logging.getLogger(__name__)

CHUNK = 64
STREAM_LOOK = 256
"""Samples of a stream that the report looks at; the rest is measured as it comes."""


@dataclass
class SourceReport:
    """One source. ``dropped`` counts samples by reason; ``examples`` has the first message of each reason."""

    path: str
    weight: float
    samples: int
    used: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    targets: int = 0
    image_tokens: int = 0
    tiles: int = 0
    most_tiles: int = 0


@dataclass
class Report:
    """The whole preflight. ``fill``: how much of the rows is real tokens. ``batches``: micro-batches an epoch."""

    sources: list[SourceReport]
    max_length: int
    fill: float
    batches: int | None

    def lines(self) -> list[str]:
        """The report for people."""
        lines = []
        for one in self.sources:
            tokens = one.tokens
            lines.append(f"{one.path}: {one.used} of {one.samples} samples, weight {one.weight:g}")
            if one.used:
                lines.append(
                    f"  tokens a sample: median {tokens['median']}, 95 % {tokens['p95']}, longest {tokens['max']}"
                    f" (row: {self.max_length}); {100 * one.image_tokens // max(1, tokens['total'])} % image tokens,"
                    f" {one.targets / max(1, one.used):.0f} learnt; tiles: {one.tiles / one.used:.1f},"
                    f" most {one.most_tiles}"
                )
            if one.cut:
                lines.append(f"  {one.cut} are cut at their end to fit")
            for reason, count in one.dropped.items():
                lines.append(f"  {count} left out, {reason}: {one.examples[reason]}")
        if self.batches is not None:
            lines.append(f"{self.batches} micro-batches an epoch, {self.fill:.0%} of their places real tokens")
        return lines


def preflight(config: DataConfig, encoder: Encoder, seed: int, cache: Path | None) -> tuple[Plan, Report]:
    """Open and measure every source; returns the plan of micro-batches and the report.

    cache: a folder for measurements, so that resuming does not measure again. Raises TrainingError where a source has
    nothing to train on, or a sample is too long and ``too_long`` is ``refuse``.
    """
    if not config.train:
        raise ConfigurationError("data.train names no source; give it at least one path.")
    sources = [open_source(one) for one in config.train]
    weights = [_weight(one, source) for one, source in zip(config.train, sources, strict=True)]
    measured, reports = [], []
    for one, source, weight in zip(config.train, sources, weights, strict=True):
        if isinstance(source, Stream):
            look = _StreamMeasure(source, encoder)
            found = [look.measure(name, record) for name, record in islice(source.records(0, once=True), STREAM_LOOK)]
            measured.append(Measured(source, weight, np.zeros(0, np.int64), look))
        else:
            found = _measure(source, encoder, config.workers, _cache_file(cache, one, encoder))
            lengths = np.array([0 if m.problem else m.length for m in found], np.int64)
            measured.append(Measured(source, weight, lengths))
        reports.append(_report(one, weight, found))
    for report in reports:
        _refuse(report, config)
    plan = Plan(
        measured,
        rows=config.rows,
        max_length=config.max_length,
        packing=config.packing,
        window=config.window,
        seed=seed,
    )
    return plan, _whole(plan, reports)


class _StreamMeasure:
    """Length of a record of a stream, 0 for one that is left out."""

    def __init__(self, source: Stream, encoder: Encoder) -> None:
        self.source = source
        self.encoder = encoder

    def measure(self, name: str, record: Mapping[str, Any]) -> Measure:
        try:
            return self.encoder.measure(self.source.understand(name, record))
        except SmolVLMError as error:
            return Measure(problem=str(error))

    def __call__(self, name: str, record: Mapping[str, Any]) -> int:
        found = self.measure(name, record)
        if found.problem:
            logger.warning("%s is left out: %s", name, found.problem)
        return 0 if found.problem else found.length


class _Chunk:
    """Measures a chunk of a source, in a worker process."""

    def __init__(self, source: Source, encoder: Encoder) -> None:
        self.source = source
        self.encoder = encoder

    def __call__(self, indices: range) -> Any:
        return [self._one(index) for index in indices]

    def _one(self, index: int) -> Measure:
        try:
            return self.encoder.measure(self.source.read(index))
        except SmolVLMError as error:
            return Measure(problem=str(error))


def _measure(source: Source, encoder: Encoder, workers: int, cache: Path | None) -> list[Measure]:
    if cache is not None and cache.exists():
        return [Measure(*values) for values in json.loads(cache.read_text(encoding="utf-8"))]
    count = len(source)
    chunks: Iterator[range] = (range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK))
    # Starting processes takes seconds; few samples are measured sooner than that.
    found: list[Measure] = []
    for part in read_ahead(_Chunk(source, encoder), chunks, workers if count > 20 * CHUNK else 0):
        found += part  # type: ignore[arg-type]
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps([list(asdict(m).values()) for m in found]))
    return found


def _cache_file(folder: Path | None, config: SourceConfig, encoder: Encoder) -> Path | None:
    """Where a source's measurements are kept; changes with the file, the processor and the limits."""
    if folder is None:
        return None
    path = Path(config.path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    settings = encoder.image_processor.to_dict() if hasattr(encoder.image_processor, "to_dict") else {}
    known = [config.model_dump(), stamps, settings, encoder.template, encoder.max_length, encoder.cut]
    digest = hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()
    return folder / f"{digest[:16]}.json"


def _report(config: SourceConfig, weight: float, found: Sequence[Measure]) -> SourceReport:
    used = [m for m in found if not m.problem]
    report = SourceReport(config.path, weight, len(found), len(used), sum(m.cut for m in used))
    reasons: Counter[str] = Counter()
    for m in found:
        if m.problem:
            reason = _reason(m.problem)
            reasons[reason] += 1
            report.examples.setdefault(reason, m.problem)
    report.dropped = dict(reasons)
    if used:
        lengths = np.array([m.length for m in used])
        median, high = np.percentile(lengths, [50, 95]).astype(int)
        report.tokens = {
            "median": int(median), "p95": int(high), "max": int(lengths.max()), "total": int(lengths.sum()),
        }  # fmt: skip
        report.targets = sum(m.targets for m in used)
        report.image_tokens = sum(m.image_tokens for m in used)
        report.tiles = sum(m.tiles for m in used)
        report.most_tiles = max(m.tiles for m in used)
    return report


def _reason(problem: str) -> str:
    if "max_length" in problem:
        return "too long"
    if "no answer" in problem:
        return "no answer to learn"
    if problem.startswith("Video "):
        return "unreadable video"
    return "unreadable picture" if "picture" in problem and "pictures of" not in problem else "broken record"


def _refuse(report: SourceReport, config: DataConfig) -> None:
    why = "; ".join(f"{count} × {reason} ({report.examples[reason]})" for reason, count in report.dropped.items())
    if not report.used:
        raise TrainingError(f"{report.path} leaves nothing to train on: all {report.samples} samples drop out: {why}")
    long = report.dropped.get("too long", 0)
    if long and config.too_long == "refuse":
        raise TrainingError(
            f"{report.path}: {long} of {report.samples} samples are longer than data.max_length {config.max_length}, "
            f"which data.too_long = refuse does not allow. The first: {report.examples['too long']}"
        )


def _whole(plan: Plan, reports: list[SourceReport]) -> Report:
    if any(isinstance(one.source, Stream) for one in plan.sources):
        return Report(reports, plan.max_length, 0.0, None)
    epoch = epoch_draws(plan)
    tokens = places = batches = 0
    for batch in plan._group(islice(plan.draws(), epoch), flush=True):
        lengths = [sum(draw.length for draw in row) for row in batch]
        tokens, places, batches = tokens + sum(lengths), places + len(lengths) * max(lengths), batches + 1
    return Report(reports, plan.max_length, tokens / max(1, places), batches)


def epoch_draws(plan: Plan) -> int:
    """Samples in one pass over the data: as many as there are, or, with weights, until each has come once."""
    used = [int((one.lengths > 0).sum()) for one in plan.sources]
    total = sum(one.weight for one in plan.sources)
    return max(round(count * total / one.weight) for count, one in zip(used, plan.sources, strict=True))


def _weight(config: SourceConfig, source: Source | Stream) -> float:
    if config.weight is not None:
        return config.weight
    if isinstance(source, Stream):
        raise ConfigurationError(f"The stream {config.path} has no known size; give it a weight.")
    return float(len(source))
