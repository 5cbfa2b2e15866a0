"""From a dataset to numbered micro-batches, read ahead in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.training.samples import Batch, Sample, collate

__all__ = ["Batches", "SampleBatches", "SampleSource", "read_ahead"]


class Batches(Protocol):
    """Numbered micro-batches; the same number is the same batch every time."""

    def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield micro-batches start + rank, start + rank + world, start + rank + 2 · world, …"""
        ...


class SampleSource(Protocol):
    """Samples by number; with ``__len__`` they are a finite set, without they never end."""

    def __getitem__(self, index: int, /) -> Sample:
        """Return sample ``index``, the same every time."""
        ...


class SampleBatches:
    """Micro-batches of ``batch_size`` samples each.

    A dataset with a length is shuffled anew for each epoch (``shuffle=False``: kept in order) and repeated without end;
    a batch may span two epochs. ``workers`` processes read ahead (0: read in the training process).
    """

    def __init__(
        self,
        dataset: SampleSource,
        batch_size: int,
        pad_token_id: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        worker_start: str = "forkserver",
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1; it is {batch_size}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.shuffle = shuffle
        self.workers = workers
        self.worker_start = worker_start
        length = getattr(dataset, "__len__", None)
        self.size: int | None = length() if length is not None else None
        if self.size == 0:
            raise ConfigurationError("The dataset is empty; there is nothing to train on.")

    def batch(self, number: int) -> Batch:
        """Micro-batch ``number``."""
        first = number * self.batch_size
        indices = [self._index(place) for place in range(first, first + self.batch_size)]
        return collate([self.dataset[index] for index in indices], self.pad_token_id)

    def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield micro-batches start + rank, start + rank + world, … without end."""
        return read_ahead(self.batch, _count(start + rank, world), self.workers, self.worker_start)

    def _index(self, place: int) -> int:
        if self.size is None:
            return place
        epoch, within = divmod(place, self.size)
        return int(self._order(epoch)[within]) if self.shuffle else within

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        known: tuple[int, np.ndarray[Any, Any]] | None = self.__dict__.get("_cached_order")
        if known is None or known[0] != epoch:
            assert self.size is not None
            known = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size))
            self._cached_order = known
        return known[1]


class _Numbered(TorchDataset[Batch]):
    """A function as a map-style dataset, for DataLoader."""

    def __init__(self, make: Callable[[Any], Batch]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Batch:
        return self.make(key)


def read_ahead(
    make: Callable[[Any], Batch], keys: Iterator[Any], workers: int, start: str = "forkserver", depth: int = 4
) -> Iterator[Batch]:
    """Yield ``make(key)`` for every key, in order; with ``workers`` > 0 computed ahead in that many processes."""
    if workers == 0:
        yield from map(make, keys)
        return
    loader = DataLoader(
        _Numbered(make),
        batch_size=None,
        sampler=_Keys(keys),
        num_workers=workers,
        prefetch_factor=depth,
        multiprocessing_context=start,
        worker_init_fn=_one_thread,
    )
    yield from loader


class _Keys(torch.utils.data.Sampler[Any]):
    def __init__(self, keys: Iterator[Any]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return self.keys


def _one_thread(worker: int) -> None:
    # The training process has the cores; tokenizers would otherwise start a pool of threads in each worker.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _count(first: int, step: int) -> Iterator[int]:
    number = first
    while True:
        yield number
        number += step


def take(dataset: SampleSource, count: int) -> Sequence[Sample]:
    """The first ``count`` samples of a dataset (fewer where it has fewer)."""
    length = getattr(dataset, "__len__", None)
    return [dataset[i] for i in range(count if length is None else min(count, length()))]
