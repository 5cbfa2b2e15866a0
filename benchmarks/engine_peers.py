"""The engines that we compare with: which script runs each in a process of its own, and why one cannot run here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["LLAMACPP", "LLAMACPP_FILES", "OVERLAYS", "PEERS", "TOWERS", "Peer", "overlay"]

ROOT = Path(__file__).resolve().parents[1]
LLAMACPP = ROOT / "build" / "peers" / "llamacpp"
"""What ``peers/build_llamacpp.py`` makes: programs, libraries, GGUF files and ``settings.json``."""

TOWERS = ROOT / "build" / "peers" / "towers"
"""The tower in other frameworks' formats, by ``peers/export_tower.py``."""

OVERLAYS = ROOT / ".peers"
"""Packages that only peers need, one folder each, by ``peers/install.py``; never in the environment itself."""

LLAMACPP_FILES = {
    "llamacpp": ("text-f16.gguf", "vision-f16.gguf"),
    "llamacpp_bf16": ("text-bf16.gguf", "vision-f16.gguf"),
    "llamacpp_q8": ("text-q8_0.gguf", "vision-q8_0.gguf"),
    "llamacpp_q4": ("text-q4_0.gguf", "vision-f16.gguf"),
}


EVERYTHING = ("tower", "prefill", "decode", "ttft")


class Peer(NamedTuple):
    """One engine: the ``script`` that runs it, ``missing`` (why it cannot run, or nothing) and what it ``does``."""

    script: str
    missing: Callable[[], str]
    does: tuple[str, ...] = EVERYTHING


def overlay(package: str) -> bool:
    """Make ``package`` importable, from its own folder if the environment lacks it; False if it is in neither."""
    folder = str(OVERLAYS / package)
    if importlib.util.find_spec(package) is None and folder not in sys.path:
        sys.path.append(folder)  # behind the environment: ours come first
        importlib.invalidate_caches()
    return importlib.util.find_spec(package) is not None


def _needs(module: str, how: str) -> Callable[[], str]:
    def missing() -> str:
        return "" if importlib.util.find_spec(module) else f"the module {module} is not installed; {how}"

    return missing


def _llamacpp(kind: str) -> Callable[[], str]:
    def missing() -> str:
        absent = [name for name in ("llamacpp_worker", *LLAMACPP_FILES[kind]) if not (LLAMACPP / name).exists()]
        how = "python benchmarks/peers/build_llamacpp.py makes them"
        return f"there is no {', '.join(absent)} in {LLAMACPP}; {how}" if absent else ""

    return missing


def _tower(package: str, file: str) -> Callable[[], str]:
    def missing() -> str:
        if not overlay(package):
            return f"{package} is not installed; python benchmarks/peers/install.py {package}"
        how = "python benchmarks/peers/export_tower.py makes it"
        return "" if (TOWERS / file).exists() else f"there is no {file} in {TOWERS}; {how}"

    return missing


PEERS: dict[str, Peer] = {
    "transformers": Peer("engine_workers.py", _needs("transformers", "pip install transformers")),
    "llamacpp": Peer("peers/llamacpp.py", _llamacpp("llamacpp"), ("tower", "prefill", "decode")),
    "llamacpp_bf16": Peer("peers/llamacpp.py", _llamacpp("llamacpp_bf16"), ("prefill", "decode")),
    "llamacpp_q8": Peer("peers/llamacpp.py", _llamacpp("llamacpp_q8")),
    "llamacpp_q4": Peer("peers/llamacpp.py", _llamacpp("llamacpp_q4"), ("prefill", "decode")),
    "openvino": Peer("peers/towers.py", _tower("openvino", "tower.xml"), ("tower",)),
    "ort": Peer("peers/towers.py", _tower("onnxruntime", "tower-int8.onnx"), ("tower",)),
}
"""Kind of worker to what runs it. A tower that another kind has already is not measured twice."""
