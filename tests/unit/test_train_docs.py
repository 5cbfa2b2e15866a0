"""Every command of docs/finetuning.md runs, shortened and on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.training_helpers import read_lines, tiny_checkpoint

ROOT = Path(__file__).parents[2]
SHORT = [
    "epochs=null",
    "data.image={size: {longest_edge: 32}}",
    "steps=2",
    "eval.every=0",
    "device=cpu",
    "data.workers=0",
    "log.bar=false",
]


def commands() -> list[str]:
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]


def _python(words: list[str], patch: pytest.MonkeyPatch, base: Path) -> None:
    words = [str(base) if word == "demo" else word for word in words]
    patch.setattr(sys, "argv", words + (["--count", "12"] if "make_data" in words[0] else []))
    runpy.run_path(words[0], run_name="__main__")


def _smolvlm(words: list[str], patch: pytest.MonkeyPatch, base: Path) -> None:
    from smolvlm_fms.cli import main

    patch.setattr(sys, "argv", ["smolvlm", *words, f"model={base}", *SHORT])
    try:
        main()
    except SystemExit as end:
        assert not end.code


def _torchrun(words: list[str], patch: pytest.MonkeyPatch, base: Path) -> None:
    """With two processes in place of eight, and the command's module in place of its installed script."""
    where = words.index("smolvlm")
    assert words[:where] == ["--nproc-per-node", "8", "--no-python"]
    script = Path("smolvlm.py")
    script.write_text("from smolvlm_fms.cli import main\nmain()\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    small = ["data.max_length=512", "accumulate=2", "log.trackers=[]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*launch, *words[where + 1 :], f"model={base}", *SHORT, *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    shutil.copytree(ROOT / "examples" / "finetune", tmp_path / "examples" / "finetune")
    monkeypatch.chdir(tmp_path)
    runners = {"python": _python, "smolvlm": _smolvlm, "torchrun": _torchrun}
    found = commands()
    assert len(found) == 9
    for command in found:
        program, *words = shlex.split(command)
        runners[program](words, monkeypatch, base)
    for run in ("dice", "dice-lora", "dice-both", "large", "split"):
        assert [line["step"] for line in read_lines(Path("runs") / run / "metrics.jsonl")] == [1, 2]
        assert (Path("runs") / run / "final" / "model.safetensors").exists()
    for run, beside in (("dice-lora", None), ("dice-both", ["model.connector.modality_projection.proj"])):
        adapter = Path("runs") / run / "final" / "adapter"
        assert (adapter / "adapter_model.safetensors").exists()
        assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == beside
