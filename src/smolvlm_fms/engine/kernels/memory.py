"""Memory for packed weights: side by side, on pages of 2 MB where the system has them.

A decode step reads every weight once, and at pages of 4 KB the processor's page walks cost it a tenth to a fifth of the
memory's speed. malloc gives such pages by chance at best; here they are asked for.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

__all__ = ["empty"]

PAGE = 2 << 20
CHUNK = 32 << 20
SMALL = 16 << 10
"""Bytes below which a tensor is left to torch."""
LINE = 64

_lock = threading.Lock()


class _Chunk(mmap.mmap):
    """Anonymous memory that tensors are cut from. Each of them holds it; it goes with the last one."""

    used: int
    start: int


_open: weakref.ref[_Chunk] | None = None


def _new_chunk(room: int) -> _Chunk | None:
    try:
        chunk = _Chunk(-1, room + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        chunk.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # no such pages here, or no address space under a limit
        return None
    chunk.start = -torch.frombuffer(chunk, dtype=torch.uint8).data_ptr() % PAGE
    chunk.used = 0
    return chunk


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, contiguous, at the start of a cache line."""
    global _open
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    with _lock:
        chunk = _open() if _open is not None else None
        if chunk is None or chunk.used + size > len(chunk) - PAGE:
            chunk = _new_chunk(max(CHUNK, -(-size // PAGE) * PAGE))
            if chunk is None:
                return torch.empty(shape, dtype=dtype)
            _open = weakref.ref(chunk)
        offset = chunk.start + chunk.used
        chunk.used += -(-size // LINE) * LINE
        return torch.frombuffer(chunk, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
