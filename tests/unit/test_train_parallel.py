"""Several processes over gloo train as one does, however they share the model; what they leave, others take up.

The processes are forked from one that has imported everything: under ``torchrun``, which the test of the documentation
uses, most of the time goes into that. One launch runs several configurations.
"""

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

from smolvlm_fms.errors import ConfigurationError, TrainingError
from smolvlm_fms.training.config import ParallelConfig, TrainConfig
from smolvlm_fms.training.parallel import check_parallel
from smolvlm_fms.training.run import prepare, train
from smolvlm_fms.training.tensor import split_layers
from tests.unit.test_train_run import settings
from tests.unit.training_helpers import read_lines, tiny_checkpoint, tiny_model, write_skill

SCRIPT = """
import os, shutil, signal, sys
import torch.distributed as dist
from smolvlm_fms.training.checkpoint import CheckpointFolder
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.run import train

def work(rank, world, meet, words):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    for word in words:
        action, _, file = word.partition(":")
        config = TrainConfig.load(file)
        if action == "again" and rank == 0:  # as if the run had died after its last checkpoint but one
            shutil.rmtree(max((config.run / "checkpoints").glob("step-*")))
            shutil.rmtree(config.run / "final")
        if action == "kill":  # in the middle of a checkpoint: its tensors are written, it does not count yet
            commit = CheckpointFolder.commit

            def dying(self, step, facts):
                if step == 8:
                    os.kill(os.getpid(), signal.SIGKILL)
                return commit(self, step, facts)

            CheckpointFolder.commit = dying
        dist.barrier()
        train(config, say=lambda line: None)
    dist.destroy_process_group()

def fork(rank, world, meet, words):
    child = os.fork()
    if child == 0:
        try:
            work(rank, world, meet, words)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return child

world, meet, *words = sys.argv[1:]
children = {fork(rank, int(world), meet, words) for rank in range(int(world))}
failed = 0
while children:
    child, status = os.wait()
    children.discard(child)
    if status and not failed:
        failed = 1
        for other in children:  # they would wait for the one that died
            os.kill(other, signal.SIGKILL)
sys.exit(failed)
"""

CHANGES: dict[str, Any] = {
    "accumulate": 4, "steps": 12, "optim": {"lr": 3e-3, "ema": 0.9}, "checkpoint": {"every": 4, "keep": 9},
    "data": {"packing": False, "rows": 1}, "eval": {"every": 6, "loss_samples": 8, "generations": 2},
}  # fmt: skip


class Runs:
    """Runs of one configuration in one folder, under different ways to share the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.skill = tiny_checkpoint(folder / "base"), write_skill(folder / "skill", 24)
        with self.skill.open("a") as file:  # some batches have no picture, so that one process has none, another has
            for number in range(12):
                talk = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": f"{number}"}]
                file.write(json.dumps({"messages": talk}) + "\n")
        self.config("one", {})
        train(TrainConfig.load(folder / "one.yaml"), say=lambda line: None)

    def config(self, name: str, parallel: dict[str, int]) -> str:
        changes = {**CHANGES, "data": {**CHANGES["data"], "eval": [{"path": str(self.skill)}]}, "parallel": parallel}
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings(self.folder / name, self.base, self.skill, **changes)))
        return str(file)

    def launch(self, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        meet = self.folder / f"meet-{processes}"
        command = [sys.executable, "-c", SCRIPT, str(processes), str(meet), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    def losses(self, name: str) -> list[float]:
        lines = read_lines(self.folder / name / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    def assert_equal(self, name: str) -> None:
        """The run ``name`` has the losses, the evaluation and the final weights of the run in one process."""
        assert len(self.losses(name)) == 12 and self.losses(name) == pytest.approx(self.losses("one"), abs=1e-5)
        for ours, theirs in zip(*(read_lines(self.folder / n / "metrics.jsonl") for n in ("one", name)), strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
            assert (ours["tokens"], ours["targets"]) == (theirs["tokens"], theirs["targets"])
            assert ours.get("eval_loss") == pytest.approx(theirs.get("eval_loss"), abs=1e-5)
        one, other = (load_file(self.folder / n / "final" / "model.safetensors") for n in ("one", name))
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[n], other[n], atol=1e-4) for n in one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parallel"))


@pytest.mark.slow
def test_two_processes_train_as_one(runs: Runs) -> None:
    """FSDP2; tensor parallelism, resumed; and killed in a checkpoint, taken up by a single process."""
    sharded, split, killed = runs.config("two", {}), runs.config("split", {"tensor": 2}), runs.config("killed", {})
    done = runs.launch(2, f"run:{sharded}", f"run:{split}", f"again:{split}", f"kill:{killed}")
    assert done.returncode != 0, "the last run is killed"
    for name in ("two", "split"):
        assert (runs.folder / name / "final").exists(), done.stderr[-4000:]
        runs.assert_equal(name)
    checkpoints = runs.folder / "killed" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-0000004", ".writing-step-0000008"}
    assert train(TrainConfig.load(killed), say=lambda line: None).finished
    runs.assert_equal("killed")
    assert not list(checkpoints.glob(".writing-*"))
    with pytest.raises(TrainingError, match=r"other settings: parallel\.tensor > 1"):
        prepare(TrainConfig.load(split, ["parallel.tensor=1", "steps=13"]))


@pytest.mark.slow
def test_four_processes_train_as_one(runs: Runs) -> None:
    """HSDP, two shards twice; and two shards of which each is split over two processes."""
    hybrid, both = runs.config("hybrid", {"replicas": 2}), runs.config("both", {"tensor": 2})
    done = runs.launch(4, f"run:{hybrid}", f"run:{both}")
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("hybrid", "both"):
        runs.assert_equal(name)


def test_processes_that_cannot_be_laid_out_are_refused(tmp_path: Path, runs: Runs) -> None:
    with pytest.raises(ConfigurationError, match=r"replicas 2 × parallel\.tensor 2 does not divide 6 processes"):
        check_parallel(6, ParallelConfig(replicas=2, tensor=2))
    with pytest.raises(ConfigurationError, match="torchrun starts several"):
        prepare(TrainConfig(**settings(tmp_path, runs.base, runs.skill, parallel={"tensor": 2})))
    with pytest.raises(ConfigurationError, match="compile and parallel"):
        prepare(TrainConfig(**settings(tmp_path, runs.base, runs.skill, parallel={"tensor": 2}, compile=True)))
    with pytest.raises(ConfigurationError, match="lora and parallel"):
        prepare(TrainConfig(**settings(tmp_path, runs.base, runs.skill, parallel={"tensor": 2}, lora={})))


def test_what_cannot_be_split_is_refused() -> None:
    class Mesh:
        def size(self) -> int:
            return self.parts

        def __init__(self, parts: int) -> None:
            self.parts = parts

    with pytest.raises(ConfigurationError, match=r"tensor 4 does not divide the text's num_key_value_heads, 2"):
        split_layers(tiny_model(), Mesh(4))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="fused_weights=False"):
        split_layers(tiny_model(), Mesh(2))  # type: ignore[arg-type]
