"""Every block of code in the README runs as it stands, in a folder with two pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder such as a reader has: photo.jpg and other.jpg in it, ``smolvlm`` on the path."""
    for name, colour in (("photo.jpg", "red"), ("other.jpg", "blue")):
        picture = Image.new("RGB", (200, 200), "white")
        picture.paste(colour, (60, 60, 140, 140))
        picture.save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_block_runs(folder: Path, number: int) -> None:
    language, code = BLOCKS[number]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 4


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


def test_every_file_that_the_readme_names_is_there() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
