"""Two processes over gloo train as one does; their checkpoints are read by any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.run import train
from tests.unit.test_train_run import CHILD, settings
from tests.unit.training_helpers import read_lines, tiny_checkpoint, write_skill


def _torchrun(script: Path, file: Path, processes: int = 2) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        str(script), str(file),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def _losses(run: Path) -> list[float]:
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    base, skill = tiny_checkpoint(tmp_path / "base"), write_skill(tmp_path / "skill", 24)
    with skill.open("a") as file:  # some batches have no picture, so that one process has none and the other has
        for number in range(12):
            talk = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": f"{number}"}]
            file.write(json.dumps({"messages": talk}) + "\n")
    script = tmp_path / "run.py"
    script.write_text(f"if __name__ == '__main__':\n    {CHILD.strip().replace(chr(10), chr(10) + '    ')}\n")
    changes: dict[str, Any] = {
        "accumulate": 4, "steps": 12, "optim": {"lr": 3e-3, "ema": 0.9}, "checkpoint": {"every": 4, "keep": 9},
        "data": {"packing": False, "rows": 1, "eval": [{"path": str(skill)}]},
        "eval": {"every": 6, "loss_samples": 8, "generations": 2},
    }  # fmt: skip
    train(TrainConfig(**settings(tmp_path / "one", base, skill, **changes)), say=lambda line: None)
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "two", base, skill, **changes)))
    _torchrun(script, file)
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)

    # One process takes up what two have left after step 8, and ends where they ended.
    resumed = tmp_path / "two"
    for leftover in ("checkpoints/step-0000012", "final"):
        (resumed / leftover).rename(tmp_path / Path(leftover).name)
    result = train(TrainConfig.load(file), say=lambda line: None)
    assert result.finished and _losses(resumed) == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
