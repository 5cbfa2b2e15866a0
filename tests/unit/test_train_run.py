"""``smolvlm train`` from a YAML file to a checkpoint: the run folder, killed and full disks, adapters."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import smolvlm_fms as sv
from smolvlm_fms.errors import CheckpointError, ConfigurationError, TrainingError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.lora import adapter_base, merge_adapter
from smolvlm_fms.processing.processor import SmolVLMProcessor
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.run import prepare, train
from tests.unit.training_helpers import read_lines, tiny_checkpoint, write_skill


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def skill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_skill(tmp_path_factory.mktemp("skill"), 24)


def settings(run: Path, base: Path, skill: Path, **changes: Any) -> dict[str, Any]:
    data = {"train": [{"path": str(skill)}], "max_length": 256, "rows": 2, "workers": 0, "window": 16}
    values: dict[str, Any] = {
        "run": str(run), "model": str(base), "steps": 8, "precision": "float32", "device": "cpu",
        "optim": {"lr": 3e-3}, "log": {"bar": False, "trackers": []}, "checkpoint": {"every": 3}, "data": data,
    }  # fmt: skip
    return {**values, **changes, "data": data | changes.get("data", {})}


@pytest.fixture
def smolvlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command, in this process: (exit code, standard output, standard error)."""
    from smolvlm_fms.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smolvlm", *arguments])
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_command_trains_and_leaves_a_checkpoint(tmp_path: Path, base: Path, skill: Path, smolvlm: Any) -> None:
    run = tmp_path / "run"
    held_out = {"eval": [{"path": str(skill)}]}
    values = settings(run, base, skill, steps=20, data=held_out, eval={"every": 0, "generations": 3})
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(values))
    code, out, err = smolvlm("train", str(file), "--preflight")
    assert code == 0 and "24 of 24 samples" in out, err
    code, out, err = smolvlm("train", str(file), "optim.lr=4e-3", "log.trackers=[tensorboard]")
    assert code == 0 and "Done after 20 steps" in out, err
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[0]["loss"] > 5 and lines[-1]["eval_loss"] < lines[0]["loss"] - 3 and 0 < lines[0]["mfu"] < 1
    assert len(read_lines(run / "samples.jsonl")) == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 4e-3
    assert json.loads((run / "preflight.json").read_text())["sources"][0]["used"] == 24
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    model, processor = load_model(run / "final"), SmolVLMProcessor.from_pretrained(run / "final")
    ids = torch.tensor([processor.tokenizer.encode("User: hello")])
    assert torch.isfinite(model(ids)).all()
    said = [line for line in read_lines(run / "samples.jsonl") if line["prompt"].endswith("Assistant:")]
    assert len(said) == 3
    picture = skill.with_name(read_picture(skill))
    answer = sv.load(run / "final").ask(picture, "What is in the picture?", max_tokens=48)
    assert answer.text.strip() == said[0]["said"], "the engine says what the trainer's evaluation heard"
    assert smolvlm("train", str(file), "optim.lr=4e-3")[0] == 0 and len(read_lines(run / "metrics.jsonl")) == 20
    code, _, err = smolvlm("train", str(file), "optim.lr=5e-3")
    assert code == 1 and "other settings: optim.lr" in err
    code, _, err = smolvlm("train", str(file), "optim.rate=1")
    assert code == 1 and "there is no field optim.rate" in err


def read_picture(skill: Path) -> str:
    """The first conversation's picture."""
    return str(read_lines(skill)[0]["messages"][0]["content"][0]["path"])


CHILD = """
import sys
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.run import train
train(TrainConfig.load(sys.argv[1]), say=lambda line: None)
"""


def _child(file: Path, limit: int = 0) -> subprocess.Popen[str]:
    """A training process; ``limit`` is the largest file, in bytes, that it can write (0: any)."""
    code = CHILD
    if limit:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" + CHILD
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_run_continues_to_the_bit(tmp_path: Path, base: Path, skill: Path) -> None:
    changes: dict[str, Any] = {"steps": 40, "checkpoint": {"every": 2}, "optim": {"lr": 3e-3, "ema": 0.9}}
    train(TrainConfig(**settings(tmp_path / "whole", base, skill, **changes)), say=lambda line: None)
    wanted = {line["step"]: line["loss"] for line in read_lines(tmp_path / "whole" / "metrics.jsonl")}
    run, file = tmp_path / "killed", tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(settings(run, base, skill, **changes)))
    seen, draw = 0, random.Random(time.time_ns())
    for _ in range(3):
        child = _child(file)
        # Killed somewhere in the steps after the next one that it logs, be it in a step or in a checkpoint.
        seen = _wait_for_step(run / "metrics.jsonl", seen + 1, child)
        time.sleep(draw.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        seen = max(seen, *_logged(run / "metrics.jsonl"))
    last = _child(file)
    assert last.wait(timeout=120) == 0, last.communicate()
    last.communicate()
    assert {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl")} == wanted
    whole, killed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def _logged(path: Path) -> list[int]:
    if not path.exists():
        return [0]
    return [0, *(json.loads(line)["step"] for line in path.read_text().splitlines(True) if line.endswith("\n"))]


def _wait_for_step(path: Path, step: int, child: subprocess.Popen[str]) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if child.poll() is not None:
            break
        if (reached := max(_logged(path))) >= step:
            return reached
        time.sleep(0.005)
    return step


def test_a_full_disk_is_reported_and_harms_nothing(tmp_path: Path, base: Path, skill: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "train.yaml"
    values = settings(run, base, skill, steps=4, checkpoint={"every": 4})
    train(TrainConfig(**values), say=lambda line: None)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*") if path.is_file()}
    file.write_text(yaml.safe_dump({**values, "steps": 8, "checkpoint": {"every": 2}}))
    child = _child(file, limit=100_000)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "The checkpoint of step 6 could not be written" in errors and "Training goes on" in errors
    assert "TrainingError: The checkpoint of step 8" in errors and "the checkpoint of step 4 is intact" in errors
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*") if path.is_file()} == before
    assert max(_logged(run / "metrics.jsonl")) == 8
    result = train(TrainConfig.load(file), say=lambda line: None)
    assert result.finished and sorted(_logged(run / "metrics.jsonl")) == list(range(9))


def test_epochs_give_the_steps(tmp_path: Path, base: Path, skill: Path) -> None:
    trainer, report = prepare(TrainConfig(**settings(tmp_path, base, skill, epochs=2, accumulate=2)))
    assert report.batches is not None and abs(trainer.config.steps - report.batches) <= 1


def test_a_model_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="model is missing"):
        prepare(TrainConfig(run=tmp_path))


def test_unlearnable_data_is_refused_before_the_first_step(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(TrainingError, match="leaves nothing to train on"):
        prepare(TrainConfig(**settings(tmp_path / "run", base, path)))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, base: Path, skill: Path) -> Path:
    run = tmp_path_factory.mktemp("lora")
    values = settings(run, base, skill, steps=20, lora={"rank": 4, "alpha": 8}, optim={"lr": 2e-2})
    train(TrainConfig(**values), say=lambda line: None)
    return run


def test_adapters_are_all_that_changes(adapted: Path, base: Path) -> None:
    losses = [line["loss"] for line in read_lines(adapted / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    before, after = load_file(base / "model.safetensors"), load_file(adapted / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if "text_model.layers" in n and "proj" in n}
    checkpoint = load_file(next((adapted / "checkpoints").glob("step-*")) / "state.safetensors")
    assert all("lora_" in name for name in checkpoint)


def test_an_adapter_merges_to_the_same_weights(adapted: Path, base: Path, tmp_path: Path) -> None:
    assert adapter_base(adapted / "final" / "adapter") == str(base)
    merge_adapter(base, adapted / "final" / "adapter", tmp_path)
    merged, final = load_file(tmp_path / "model.safetensors"), load_file(adapted / "final" / "model.safetensors")
    assert all(torch.allclose(merged[name], final[name], atol=1e-6) for name in final)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_adapter_onto_transformers_model(adapted: Path, base: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.SmolVLMForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, adapted / "final" / "adapter").eval()
    ours = load_model(adapted / "final")
    ids = torch.randint(20, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, ours(ids), atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_parts_are_trained_whole_beside_adapters(tmp_path: Path, base: Path, skill: Path) -> None:
    """LoRA in the text, connector and tower whole: one peft adapter, which peft and we put together alike."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    values = settings(
        tmp_path / "run", base, skill, steps=6, lora={"rank": 4, "alpha": 8, "full": ["connector", "tower"]},
        connector={"lr": 1e-2}, tower={"lr": 1e-3}, optim={"lr": 1e-2},
    )  # fmt: skip
    train(TrainConfig(**values), say=lambda line: None)
    final = tmp_path / "run" / "final"
    before, after = load_file(base / "model.safetensors"), load_file(final / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before
        if "connector" in name or "vision_model" in name or ("text_model.layers" in name and "proj" in name)
    }  # fmt: skip
    merge_adapter(base, final / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.allclose(merged[name], after[name], atol=1e-6) for name in after)
    theirs = transformers.SmolVLMForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, final / "adapter").eval()
    ours = load_model(final)
    generator = torch.Generator().manual_seed(0)
    image = torch.full((1, 4), ours.config.image_token_id)
    ids = torch.cat([torch.randint(20, 200, (1, 6), generator=generator), image], 1)
    pixels = torch.rand(1, 1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids, pixel_values=pixels).logits, ours(ids, pixels), atol=1e-4)


def test_adapters_and_whole_parts_must_not_overlap(tmp_path: Path, base: Path, skill: Path) -> None:
    lora = {"targets": r"vision_tower\..*\.query", "full": ["tower"]}
    with pytest.raises(ConfigurationError, match=r"lora\.full trains the tower whole"):
        prepare(TrainConfig(**settings(tmp_path, base, skill, lora=lora)))


def test_an_adapter_of_another_model_is_refused(adapted: Path, base: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(adapted / "final" / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, key: torch.zeros(3, 4)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not belong to"):
        merge_adapter(base, adapter, tmp_path / "out")
    save_file({name: t for name, t in tensors.items() if name != key}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="half of a pair"):
        merge_adapter(base, adapter, tmp_path / "out")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="neither LoRA's nor"):
        merge_adapter(base, adapter, tmp_path / "out")
    settings_file = adapter / "adapter_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
