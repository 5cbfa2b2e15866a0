"""``smolvlm convert``: its JSON object, its exit codes, its one-line errors, and the examples in docs/convert.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMOLVLM = [sys.executable, "-c", "from smolvlm_fms.cli import main; main()"]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "convert.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SMOLVLM, "convert", *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_json_and_exit_code(tmp_path: Path) -> None:
    done = run("demo", tmp_path / "out", "--to", "gguf", "--quantize", "int8", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {
        "ok", "model", "target", "out", "quantize", "dtype", "files", "checks", "seconds",
    }  # fmt: skip
    assert report["ok"] and report["target"] == "gguf" and report["quantize"] == "int8"
    assert all(set(check) == {"name", "max_abs", "agree", "ok", "note"} for check in report["checks"])
    assert sorted(report["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_what_a_person_reads(tmp_path: Path) -> None:
    done = run("demo", tmp_path / "out", "--to", "fms")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "ok  get_model, picture: logits: max |difference|" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"written to {tmp_path / 'out'}")
    again = run("demo", tmp_path / "out", "--to", "fms")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "--force" in again.stderr
    assert again.stderr.count("\n") == 1


def test_a_failed_check_is_exit_1_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import smolvlm_fms.export.folders as folders; from smolvlm_fms.export.checks import Check;"
        "folders.FmsFolder.check = lambda *a: [Check('weights', 1.0, 0.5, False)];"
        "from smolvlm_fms.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", "demo", str(tmp_path / "out"), "--to", "fms"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "FAILED  weights" in done.stdout and "NOT written" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_examples_run(number: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", BLOCKS[number]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "written to" in done.stdout


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 3
