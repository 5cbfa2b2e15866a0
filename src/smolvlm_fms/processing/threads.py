"""Threads for work that releases Python's lock: resizing, and NumPy's arithmetic on whole tiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["available_threads", "bands", "in_threads"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def available_threads() -> int:
    """As many as torch uses, so that one setting (``OMP_NUM_THREADS``, ``torch.set_num_threads``) rules both."""
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1))


def bands(rows: int, threads: int, most: int | None = None) -> list[tuple[int, int]]:
    """(begin, end) of what one thread takes at a time: multiples of 32 rows, at most ``most``."""
    band = -(-min(-(-rows // max(threads, 1)), most or rows) // 32) * 32
    return [(begin, min(begin + band, rows)) for begin in range(0, rows, band)]


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In], threads: int | None = None) -> list[_Out]:
    """``[work(item) for item in items]`` on up to ``threads`` threads (all that are available); the first error counts.

    The pool lives for this call only: one that outlived it would not survive a fork.
    """
    workers = min(len(items), threads or available_threads())
    if workers < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(workers, thread_name_prefix="smolvlm-images") as pool:
        return list(pool.map(work, items))
