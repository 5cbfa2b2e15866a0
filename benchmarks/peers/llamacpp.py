"""The benchmark's worker for llama.cpp: becomes the program that ``build_llamacpp.py`` made.

python benchmarks/peers/llamacpp.py KIND CHECKPOINT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine_checkpoint
from engine_peers import LLAMACPP, LLAMACPP_FILES


def command(kind: str) -> list[str]:
    """The worker's command line, with the best settings that ``tune_llamacpp.py`` found."""
    path = LLAMACPP / "settings.json"
    settings = json.loads(path.read_text())["best"].get(kind, {}) if path.exists() else {}
    if not settings:
        print(f"*** {kind} RUNS WITH DEFAULT SETTINGS: python benchmarks/peers/tune_llamacpp.py", file=sys.stderr)
    files = [str(LLAMACPP / name) for name in LLAMACPP_FILES[kind]]
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    return [
        str(LLAMACPP / "llamacpp_worker"),
        *files,
        threads,
        str(engine_checkpoint.PICTURE),
        json.dumps(settings),
    ]


if __name__ == "__main__":
    words = command(sys.argv[1])
    os.execv(words[0], words)
