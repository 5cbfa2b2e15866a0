"""Every command and snippet of docs/evaluation.md runs; the easy-VQA example writes what the command reads."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from smolvlm_fms.cli import app
from smolvlm_fms.evaluation.suite import BUNDLED, find_suites, read_suite

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(SNIPPETS[0], {})
    program, *words = shlex.split(command)
    assert program == "smolvlm" and words[0] == "eval" and len(COMMANDS) == 4
    if "--limit" in words:
        words[words.index("--limit") + 1] = "1"
    elif "--data" not in words:
        words += ["--limit", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    if "--json" in words:
        result = json.loads(done.stdout.splitlines()[-1])
        assert tuple(result["skills"]) == BUNDLED
        assert all(set(row) == {"metric", "score", "blank", "n"} for row in result["skills"].values())
        assert [name for name, row in result["skills"].items() if row["metric"] == "cer"] == ["reading_unseen_fonts"]
        assert len(Path("answers.jsonl").read_text().splitlines()) == 1 + 2 * len(BUNDLED)
    elif "--data" in words:
        assert "colors" in done.stdout and "plain" not in done.stdout, "one kind needs no rows of its own"


def test_the_table_of_tests_is_right() -> None:
    told = {name: int(n) for name, n in re.findall(r"^\| `(\w+)` \| (\d+) \|", TEXT, re.MULTILINE)}
    assert told == {suite.name: len(suite.items) for suite in find_suites()}


def test_easy_vqa_becomes_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    fake = types.ModuleType("easy_vqa")
    asked = ["what color is the shape?", "is there not a circle?", "is a circle present?", "what shape is present?"]
    fake.get_test_questions = lambda: (asked, ["red", "no", "yes", "circle"], [0] * 4)  # type: ignore[attr-defined]
    fake.get_test_image_paths = lambda: {0: str(tmp_path / "0.png")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "easy_vqa", fake)
    monkeypatch.setattr(sys, "argv", ["from_easy_vqa.py", str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples" / "eval" / "from_easy_vqa.py"), run_name="__main__")
    suite = read_suite(tmp_path / "out" / "easy_vqa.jsonl")
    found = {item.question: (item.kind, *item.answers) for item in suite.items}
    assert found == {
        "What color is the shape?": ("color", "red"),
        "Is there not a circle?": ("not there", "no"),
        "Is a circle present?": ("there", "yes"),
        "What shape is present?": ("shape", "circle"),
    }
    assert suite.read(suite.items[0].messages[0]["content"][0]["path"])[:4] == b"\x89PNG"
