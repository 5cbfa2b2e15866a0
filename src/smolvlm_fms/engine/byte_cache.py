"""A cache bounded in bytes that forgets what was not used for longest. No torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["ByteCache"]

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Values by key; together at most ``limit`` bytes. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()

    def get(self, key: bytes) -> Value | None:
        """The value, which thereby counts as used; or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: bytes, value: Value, size: int) -> None:
        """Keep a value of ``size`` bytes; one larger than the limit is not kept."""
        with self._lock:
            self._forget(key)
            if size > self.limit:
                return
            self._entries[key] = (value, size)
            self.used += size
            while self.used > self.limit:
                self._forget(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.used = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used -= entry[1]
