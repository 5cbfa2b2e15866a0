"""From a plan to batches: worker processes read, tile and pack the samples that the plan names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from smolvlm_fms.errors import SmolVLMError, TrainingError
from smolvlm_fms.training.batches import read_ahead
from smolvlm_fms.training.config import SourceConfig
from smolvlm_fms.training.conversation import Conversation, Encoder
from smolvlm_fms.training.plan import Draw, Plan
from smolvlm_fms.training.samples import IGNORE, Batch, Sample, collate, collate_packed
from smolvlm_fms.training.sources import Source, Stream, open_source

__all__ = ["PlannedBatches", "read_samples"]

logger = logging.getLogger(__name__)


class PlannedBatches:
    """The micro-batches of a plan, for ``Trainer``."""

    def __init__(self, plan: Plan, encoder: Encoder, pad_token_id: int, workers: int) -> None:
        self.plan = plan
        self.workers = workers
        self.make = MakeBatch([one.source for one in plan.sources], encoder, pad_token_id, plan.packing)

    def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield micro-batches start + rank, start + rank + world, … without end."""
        return read_ahead(self.make, self.plan.batches(start + rank, world), self.workers)


class MakeBatch:
    """Reads and encodes the samples of one micro-batch; runs in worker processes.

    A sample that turns out to be damaged is left out with a warning: the preflight has read its header only.
    """

    def __init__(self, sources: Sequence[Source | Stream], encoder: Encoder, pad_token_id: int, packing: bool) -> None:
        self.sources = sources
        self.encoder = encoder
        self.pad_token_id = pad_token_id
        self.packing = packing

    def __call__(self, rows: Sequence[Sequence[Draw]]) -> Batch:
        encoded = [[sample for draw in row if (sample := self._sample(draw)) is not None] for row in rows]
        kept = [row for row in encoded if row]
        if not kept:
            pad = torch.tensor([self.pad_token_id])
            return collate([Sample(pad, torch.full_like(pad, IGNORE))], self.pad_token_id)
        if self.packing:
            return collate_packed(kept, self.pad_token_id)
        return collate([row[0] for row in kept], self.pad_token_id)

    def _sample(self, draw: Draw) -> Sample | None:
        source = self.sources[draw.source]
        name = draw.item[0] if isinstance(source, Stream) else f"{source.name}[{draw.item}]"
        try:
            return self.encoder.encode(self._read(source, draw))
        except SmolVLMError as error:
            logger.warning("%s is left out: %s", name, error)
            return None

    @staticmethod
    def _read(source: Source | Stream, draw: Draw) -> Conversation:
        return source.understand(*draw.item) if isinstance(source, Stream) else source.read(draw.item)


def read_samples(configs: Sequence[SourceConfig], encoder: Encoder, count: int) -> list[Sample]:
    """The first ``count`` usable samples of some sources, taken in turn (for evaluation).

    Raises TrainingError where there is none.
    """
    sources = [open_source(config) for config in configs]
    share = -(-count // max(1, len(sources)))
    samples: list[Sample] = []
    problem = ""
    for source in sources:
        found = 0
        for conversation in _all(source):
            try:
                samples.append(encoder.encode(conversation()))
                found += 1
            except SmolVLMError as error:
                problem = problem or str(error)
            if found == share:
                break
    if sources and not samples:
        raise TrainingError(f"No sample of data.eval can be used: {problem}")
    return samples[:count]


def _all(source: Source | Stream) -> Iterator[Callable[[], Conversation]]:
    """Every conversation, still to be read: reading one may raise without ending the rest."""
    if isinstance(source, Stream):
        for name, record in source.records(0, once=True):
            yield partial(source.understand, name, record)
    else:
        for index in range(len(source)):
            yield partial(source.read, index)
