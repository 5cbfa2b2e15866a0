"""Runs that are interrupted in the worst places go on to the bit: while a checkpoint is written, in all data."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smolvlm_fms.errors import TrainingError
from smolvlm_fms.training import Trainer
from smolvlm_fms.training import checkpoint as checkpoints
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.run import prepare, train
from tests.unit.test_train_loop import batches, config_for, losses
from tests.unit.test_train_run import settings
from tests.unit.training_helpers import tiny_checkpoint, tiny_model, write_skill


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors sees it, so nothing is tidied up."""


def _half_a_file(patch: pytest.MonkeyPatch) -> None:
    write = checkpoints.save_file

    def dying(tensors: Any, path: Path) -> None:
        write(tensors, path)
        if "0000008" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise Killed

    patch.setattr(checkpoints, "save_file", dying)


def _before_the_rename(patch: pytest.MonkeyPatch) -> None:
    rename = checkpoints.os.rename

    def dying(source: Path, target: Path) -> None:
        if target.name == "step-0000008":
            raise Killed
        rename(source, target)

    patch.setattr(checkpoints.os, "rename", dying)


def _after_the_rename(patch: pytest.MonkeyPatch) -> None:
    remove = checkpoints.shutil.rmtree

    def dying(path: Path, ignore_errors: bool = False) -> None:
        if path.name == ".removing-step-0000004" and path.exists():  # the old one goes, and half of it is gone
            next(path.iterdir()).unlink()
            raise Killed
        remove(path, ignore_errors)

    patch.setattr(checkpoints.shutil, "rmtree", dying)


@pytest.mark.parametrize("interrupt", [_half_a_file, _before_the_rename, _after_the_rename])
def test_death_while_a_checkpoint_is_written(
    interrupt: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"optim": {"lr": 3e-3, "ema": 0.9}, "checkpoint": {"every": 4, "keep": 1}}
    whole = Trainer(config_for(tmp_path / "whole", **changes), tiny_model(), batches())
    whole.run()
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(Killed):
            Trainer(config_for(tmp_path / "part", **changes), tiny_model(), batches()).run()
    again = Trainer(config_for(tmp_path / "part", **changes), tiny_model(seed=5), batches())
    assert again.resume() == (8 if interrupt is _after_the_rename else 4)
    again.run()
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "part" / "checkpoints").iterdir()] == ["step-0000012"]


def test_a_disk_that_is_full_at_the_end_is_reported(tmp_path: Path) -> None:
    def full(model: Any, folder: Path) -> None:
        (folder / "half").write_text("…")
        raise OSError(28, "No space left on device")

    config = config_for(tmp_path, steps=4)
    with pytest.raises(TrainingError, match=r"final could not be written: .*No space left.*step 4 is complete"):
        Trainer(config, tiny_model(), batches(), save_final=full).run()
    assert not (tmp_path / "final").exists()
    done = Trainer(config, tiny_model(), batches(), save_final=lambda model, folder: (folder / "all").touch()).run()
    assert done.finished and [path.name for path in (tmp_path / "final").iterdir()] == ["all"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same skill as a stream of `datasets` and as tar shards, and another as JSONL."""
    folder = tmp_path_factory.mktemp("data")
    lines = write_skill(folder / "skill", 14).read_text().splitlines()
    (folder / "stream").mkdir()
    for name in ("train.jsonl", *(path.name for path in (folder / "skill").glob("*.png"))):
        if name.endswith(".png"):
            shutil.copy(folder / "skill" / name, folder / "stream" / name)
    (folder / "stream" / "train.jsonl").write_text("\n".join(lines) + "\n")
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
            for number in range(shard * 7, shard * 7 + 7):
                record = json.loads(lines[number])
                (folder / "record.json").write_text(json.dumps(record).replace(f', "path": "{number}.png"', ""))
                archive.add(folder / "record.json", f"{number}.json")
                archive.add(folder / "skill" / f"{number}.png", f"{number}.png")
    return {
        "stream": folder / "stream", "shards": folder / "shard-{0..1}.tar",
        "jsonl": write_skill(folder / "more", 9, start=100), "base": tiny_checkpoint(folder / "base"),
    }  # fmt: skip


@pytest.mark.parametrize("packing", [True, False])
def test_weighted_streams_shards_and_files_resume_where_they_were(
    packing: bool, data: dict[str, Path], tmp_path: Path
) -> None:
    sources = [
        {"path": str(data["stream"]), "kind": "stream", "weight": 2, "images": str(data["stream"])},
        {"path": str(data["shards"]), "weight": 1},
        {"path": str(data["jsonl"]), "weight": 0.5},
    ]
    changes = {"data": {"train": sources, "packing": packing, "max_length": 96, "window": 8}, "steps": 10}

    def config(name: str) -> TrainConfig:
        return TrainConfig(**settings(tmp_path / name, data["base"], data["jsonl"], **changes))

    train(config("whole"), say=lambda line: None)
    trainer, _ = prepare(config("part"))
    save = trainer.checkpoints.save

    def dying(step: int, *rest: Any) -> Path:
        if step == 9:
            raise Killed
        return save(step, *rest)

    trainer.checkpoints.save = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    assert train(config("part"), say=lambda line: None).finished
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    whole, part = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
