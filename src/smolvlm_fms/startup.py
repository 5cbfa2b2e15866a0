"""What makes a start quick. A leaf: imports nothing but the standard library."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collection_paused"]


@contextmanager
def collection_paused() -> Iterator[None]:
    """Runs the block, in which objects are made to stay (imports, loading), without the garbage collector's passes.

    While torch and this package are imported, the collector looks at half a million objects again and again and finds
    nothing: an eighth of the time to a first token. Afterwards it works as before; what is there by then counts as old,
    so that no pass over all of it follows at once.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # a caller's own frozen objects stay frozen
            gc.freeze()
            gc.unfreeze()  # which puts everything among the oldest, without looking at it
        gc.enable()
