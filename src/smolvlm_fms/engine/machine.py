"""What this process may use of the machine: processors and memory, as its container allows. No torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["available_memory", "cpu_count"]

CGROUP = Path("/sys/fs/cgroup")


def cpu_count(root: Path = CGROUP) -> int:
    """Processors that threads can run on at once: the affinity mask, cut to the container's quota (at least 1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root)
    return max(1, min(allowed, math.ceil(quota))) if quota else max(1, allowed)


def available_memory(root: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process could still take: free on the machine, and within the container's limit."""
    free = 8 * 2**30
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        bound, current = _number(root / limit), _number(root / used)
        if bound is not None:
            free = min(free, max(0, bound - (current or 0)))
    return free


def _quota(root: Path) -> float | None:
    """The container's processors (cgroup v2, then v1), or None where there is no limit."""
    words = " ".join(_lines(root / "cpu.max")).split()
    if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    quota, period = _number(root / "cpu/cpu.cfs_quota_us"), _number(root / "cpu/cpu.cfs_period_us")
    if quota is not None and quota > 0 and period:
        return quota / period
    return None


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)[:1]).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
