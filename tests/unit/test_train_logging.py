"""What a run tells while it goes on: event files, Weights & Biases, the bar, the samples; and the averaged weights."""

from __future__ import annotations

import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from smolvlm_fms.training import Evaluator, TrainConfig, Trainer
from smolvlm_fms.training.config import OptimConfig
from smolvlm_fms.training.loss import token_loss
from smolvlm_fms.training.optimizer import Average
from smolvlm_fms.training.progress import Bar
from tests.unit.test_train_loop import batches, config_for
from tests.unit.training_helpers import PAD, STOP, Colours, read_lines, tiny_model


def evaluator(config: TrainConfig) -> Evaluator:
    held_out = [Colours()[i] for i in range(10_000, 10_006)]
    return Evaluator(held_out, lambda ids: " ".join(map(str, ids)), {STOP}, PAD, config.eval)


def trained(run: Path, **changes: Any) -> Trainer:
    config = config_for(run, **{"steps": 4, "eval": {"every": 2, "generations": 2}, **changes})
    trainer = Trainer(config, tiny_model(), batches(), evaluate=evaluator(config))
    trainer.run()
    return trainer


def test_event_files_are_written_unless_told_otherwise(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "mfu", "memory_gib"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-5)
    assert [event.step for event in events.Scalars("eval_loss")] == [2, 4]
    assert [event.step for event in events.Scalars("exact_match")] == [2, 4]
    words = events.Tensors("generation/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "wanted: 2" in words and "said:" in words
    trained(tmp_path / "quiet", log={"bar": False, "trackers": []})
    assert not (tmp_path / "quiet" / "tensorboard").exists()


def test_weights_and_biases_runs_off_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained(tmp_path, log={"bar": False, "trackers": ["wandb"]})
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    names = (b"grad_norm", b"eval_loss", b"exact_match", b"generation/0")
    deadline = time.monotonic() + 60  # a process of wandb's own writes, and may go on after `finish` has returned
    while not all(name in written.read_bytes() for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [name for name in names if name not in written.read_bytes()] == []


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from smolvlm_fms.training import trackers

    def broken(self: Any, step: int, metrics: Any, generations: Any) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.TensorBoard, "log", broken)
    with caplog.at_level(logging.ERROR):
        trained(tmp_path)
    assert caplog.text.count("TensorBoard takes no more metrics") == 1 and "No space left" in caplog.text
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4


def test_the_bar_shows_speed_utilisation_memory_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"loss": 1.25, "samples_per_s": 3.4, "tokens_per_s": 1234.5, "mfu": 0.41, "memory_gib": 2.25}
    words = ["loss 1.250", "3.4 samples/s", "1,234 tok/s", "MFU 41%", "2.2 GiB"]
    bar = Bar(steps=100, done=0, shown=True)
    bar.began = (0, bar.began[1] - 50)  # as if ten steps had taken fifty seconds
    bar.update(10, metrics)
    line = capsys.readouterr().err
    assert all(word in line for word in [*words, "step 10/100", "0:07:30 left"])
    monkeypatch.setattr("smolvlm_fms.training.progress.Console", lambda **_: Console(force_terminal=True, width=160))
    bar = Bar(steps=100, done=0, shown=True)
    bar.update(10, metrics)
    bar.say("  wanted: 'red'  said: 'blue'")
    assert bar.progress is not None
    bar.progress.refresh()
    bar.close()
    shown = capsys.readouterr().out
    assert all(word in shown for word in [*words, "10/100", "-:--:--", "said: 'blue'"])


def test_averaged_weights_are_what_is_evaluated_and_written(tmp_path: Path) -> None:
    model, decay = tiny_model(), 0.5
    average = Average(model, decay)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        average.update(model, step)
        kept = min(decay, (1 + step) / (10 + step))
        expected = {n: kept * expected[n] + (1 - kept) * p.detach() for n, p in model.named_parameters()}
    for name, weight in average.weights.items():
        assert torch.allclose(weight, expected[name], atol=1e-6)

    seen: dict[str, torch.Tensor] = {}
    name = "connector.proj.weight"

    def look(model: Any, step: int) -> dict[str, float]:
        seen["evaluated"] = model.get_parameter(name).detach().clone()
        return {"eval_loss": 0.0}

    def save(model: Any, folder: Path) -> None:
        seen["written"] = model.get_parameter(name).detach().clone()

    config = config_for(tmp_path, steps=3, eval={"every": 0}, optim={"lr": 3e-3, "ema": 0.9})
    trainer = Trainer(config, tiny_model(), batches(), evaluate=look, save_final=save)
    trainer.run()
    assert trainer.average is not None
    live = trainer.model.get_parameter(name)
    assert torch.equal(seen["evaluated"], trainer.average.weights[name]) and not torch.equal(seen["evaluated"], live)
    assert torch.equal(seen["written"], seen["evaluated"])


def test_z_loss_keeps_logits_from_drifting(tmp_path: Path) -> None:
    """Two runs that differ in z_loss alone: with it, log Z is nearer to 0 after the same steps."""

    def log_z(z_loss: float) -> float:
        config = config_for(tmp_path / str(z_loss), steps=20, optim={"lr": 5e-3, "z_loss": z_loss})
        trainer = Trainer(config, tiny_model(), batches())
        trainer.run()
        sample = Colours()[3]
        assert sample.pixel_values is not None
        with torch.no_grad():
            logits = trainer.model(sample.input_ids[None], sample.pixel_values[None] / 127.5 - 1)
        return float(logits[0, -3].logsumexp(-1).abs())

    assert log_z(1.0) < 0.7 * log_z(0.0)
    gradient = torch.zeros(1, 4, requires_grad=True)
    token_loss(gradient, torch.tensor([1]), z_loss=1.0)[0].backward()  # type: ignore[no-untyped-call]
    plain = torch.zeros(1, 4, requires_grad=True)
    token_loss(plain, torch.tensor([1]))[0].backward()  # type: ignore[no-untyped-call]
    assert gradient.grad is not None and plain.grad is not None
    # d (log Z)² / d logits = 2 log Z · softmax, and Z of four zeros is 4.
    assert torch.allclose(gradient.grad - plain.grad, torch.full((1, 4), 2 * 1.3862944 / 4), atol=1e-6)


def test_the_learning_rate_in_the_log_is_the_schedules(tmp_path: Path) -> None:
    trained(tmp_path, steps=10, eval={"every": 0}, optim=OptimConfig(lr=1e-2, schedule="wsd", warmup=2, decay=0.4))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[:6] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, 1e-2])
    assert rates[6:] == pytest.approx([1e-2 * (1 - n / 5) for n in range(1, 5)])


@pytest.mark.filterwarnings("ignore")  # torch's own, about what its compiler imports and looks at
def test_compiled_blocks_give_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and their gradients are made as ever, but run without Inductor, whose C++ takes minutes to build."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    curves = {}
    for name, on in (("eager", False), ("compiled", True)):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters["stats"]
        counters.clear()
        trained(tmp_path / name, compile=on, eval={"every": 2, "generations": 2})
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        curves[name] = [line["loss"] for line in lines] + [line["eval_loss"] for line in lines[1::2]]
        # Tower and text, with one tile and several: not a graph a block, nor one a batch.
        assert 2 <= counters["unique_graphs"] <= 4 if on else not counters["unique_graphs"]
    assert curves["compiled"] == pytest.approx(curves["eager"], abs=1e-5)
