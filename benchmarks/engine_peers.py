"""The engines that we compare with: which script runs each in a process of its own, and why one cannot run here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

__all__ = ["PEERS"]


def _needs(module: str, how: str) -> Callable[[], str]:
    """A check that answers why the peer cannot run, or nothing."""
    return lambda: "" if importlib.util.find_spec(module) else f"the module {module} is not installed; {how}"


PEERS: dict[str, tuple[str, Callable[[], str]]] = {
    "transformers": ("engine_workers.py", _needs("transformers", "pip install transformers")),
}
"""Kind of worker to its script and to what says why it cannot run (an empty text: it can)."""
