"""What this process may use of the machine: processors and memory, as its container allows. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from pathlib import Path

__all__ = ["available_memory", "cpu_count", "give_back_memory"]

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_count(root: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Processors that threads can run on at once: the affinity mask, cut to the container's quota (at least 1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups(root, membership) if (quota := _quota(folder)) is not None]
    return max(1, min(allowed, *(math.ceil(quota) for quota in quotas))) if quotas else max(1, allowed)


def available_memory(root: Path = CGROUP, meminfo: Path = Path("/proc/meminfo"), membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process could still take: free on the machine, and within the container's limits."""
    free = 8 * 2**30
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for folder in _groups(root, membership):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            bound, current = _number(folder / limit), _number(folder / used)
            if bound is not None:
                free = min(free, max(0, bound - (current or 0)))
    return free


def give_back_memory() -> None:
    """Have the C library return what it holds freed: after packing, some 40 MB that nobody would use again. Where it
    has no such function (musl, macOS), nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _groups(root: Path, membership: Path) -> list[Path]:
    """The process's control groups and all that they are in, as folders: a limit on any of them holds.

    In a container they are usually the roots of what is mounted; a systemd service or a container that shares its
    host's groups is further down. Lines of ``membership`` are ``number:controllers:path``, without controllers in v2.
    """
    found = [root, root / "cpu", root / "memory"]
    for line in _lines(membership):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            mounts = [root, root / "unified"]
        elif {"cpu", "memory"} & {*controllers.split(",")}:
            mounts = [root / name for name in {controllers, *controllers.split(",")}]
        else:
            continue
        inside = Path(path.strip("/"))
        found += [mount / part for mount in mounts for part in (inside, *inside.parents)]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _quota(folder: Path) -> float | None:
    """A group's processors (cgroup v2, then v1), or None where there is no limit."""
    words = " ".join(_lines(folder / "cpu.max")).split()
    if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
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
