"""The training loop on a tiny model: it learns, resumes to the bit, and loses nothing when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from smolvlm_fms.errors import ConfigurationError, TrainingError
from smolvlm_fms.training import Evaluator, SampleBatches, TrainConfig, Trainer
from smolvlm_fms.training.config import OptimConfig
from smolvlm_fms.training.loss import token_loss
from smolvlm_fms.training.optimizer import build_optimizer, rate_at
from tests.unit.training_helpers import PAD, STOP, Colours, read_lines, tiny_model


def config_for(run: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "run": run,
        "steps": 12,
        "precision": "float32",
        "device": "cpu",
        "optim": {"lr": 3e-3},
        "log": {"bar": False},
        "checkpoint": {"every": 4},
    }
    return TrainConfig(**(values | changes))


def batches(**changes: Any) -> SampleBatches:
    return SampleBatches(Colours(), 8, PAD, **changes)


def losses(run: Path) -> dict[int, float]:
    lines = read_lines(run / "metrics.jsonl")
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {line["step"]: line["loss"] for line in lines}


def test_it_learns_to_name_colours_and_says_so(tmp_path: Path) -> None:
    held_out = [Colours()[i] for i in range(10_000, 10_012)]
    config = config_for(tmp_path, steps=60, eval={"every": 0, "generations": 12}, optim={"lr": 5e-3, "ema": 0.8})
    evaluator = Evaluator(held_out, lambda ids: " ".join(map(str, ids)), {STOP}, PAD, config.eval)
    saved: list[Path] = []
    result = Trainer(
        config, tiny_model(), batches(), evaluate=evaluator, save_final=lambda model, folder: saved.append(folder)
    ).run()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert result.finished and result.final == tmp_path / "final" and len(saved) == 1
    assert lines[0]["loss"] > 3 and lines[-1]["eval_loss"] < 0.1 and lines[-1]["exact_match"] == 1.0
    assert {"step", "loss", "tokens", "lr", "grad_norm", "tokens_per_s"} <= set(lines[0])
    shown = read_lines(tmp_path / "samples.jsonl")
    assert len(shown) == 12 and all(one["said"] == one["wanted"] for one in shown)


@pytest.mark.parametrize(("precision", "kind"), [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, precision: str, kind: str) -> None:
    changes: dict[str, Any] = {"precision": precision, "accumulate": 2, "optim": {"kind": kind, "lr": 3e-3, "ema": 0.9}}
    whole = Trainer(config_for(tmp_path / "whole", **changes), tiny_model(), batches())
    whole.run()
    part = Trainer(config_for(tmp_path / "part", **changes), tiny_model(), batches())
    part.checkpoints.save, kept = _die_at(part, 8), part.checkpoints.save
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert kept is not None and losses(tmp_path / "part").keys() == set(range(1, 9))
    again = Trainer(config_for(tmp_path / "part", **changes), tiny_model(seed=5), batches())
    again.run()
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert again.average is not None and whole.average is not None
    assert all(torch.equal(again.average.weights[n], w) for n, w in whole.average.weights.items())


def _die_at(trainer: Trainer, step: int) -> Any:
    save = trainer.checkpoints.save

    def dying(at: int, *rest: Any) -> Path:
        if at == step:
            raise KeyboardInterrupt
        return save(at, *rest)

    return dying


def test_accumulating_equals_one_large_batch(tmp_path: Path) -> None:
    one = config_for(tmp_path / "one", steps=3)
    two = config_for(tmp_path / "two", steps=3, accumulate=4)
    Trainer(one, tiny_model(), batches()).run()
    Trainer(two, tiny_model(), SampleBatches(Colours(), 2, PAD)).run()
    first, second = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert first == pytest.approx(second, abs=1e-5)


def test_parts_are_frozen_and_have_their_own_rates(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = config_for(tmp_path, steps=2, tower={"train": False}, connector={"lr": 1e-2}, text={"lr": 1e-5})
    trainer = Trainer(config, model, batches())
    rates = {group["part"]: group["base_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"connector": 1e-2, "text": 1e-5}
    assert trainer.optimizer.defaults["fused"]
    trainer.run()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved is not name.startswith("vision_tower."), name
    decays = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert decays[id(model.text_model.base_model.embedding.weight)] == 0
    assert decays[id(model.connector.proj.weight)] > 0


def test_muon_turns_the_blocks_matrices_and_adamw_the_rest(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = Trainer(config_for(tmp_path, steps=60, optim={"kind": "muon", "lr": 5e-3}), model, batches())
    trainer.run()
    assert losses(tmp_path)[60] < 0.1 * losses(tmp_path)[1]
    remembered = {name: set(trainer.optimizer.state[p]) for name, p in model.named_parameters()}
    assert remembered["text_model.base_model.layers.0.attn.dense.weight"] == {"momentum_buffer"}
    assert remembered["vision_tower.layers.0.mlp.w1.weight"] == {"momentum_buffer"}
    for name in ("connector.proj.weight", "text_model.base_model.embedding.weight", "vision_tower.layers.0.ln1.weight"):
        assert remembered[name] == {"step", "exp_avg", "exp_avg_sq"}, name


def test_muon_says_where_it_is_not_for(tmp_path: Path) -> None:
    frozen = {"tower": {"train": False}, "text": {"train": False}, "optim": {"kind": "muon"}}
    with pytest.raises(ConfigurationError, match="none of them is trained"):
        Trainer(config_for(tmp_path / "connector", **frozen), tiny_model(), batches())
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny_model()
        layer = model.text_model.base_model.layers[0].attn.dense
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(ConfigurationError, match="sharded runs take adamw"):
            build_optimizer(model, config_for(tmp_path / "sharded", optim={"kind": "muon"}))
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_may_go_on_with_the_other_optimizer(tmp_path: Path) -> None:
    for steps, kind in ((4, "muon"), (8, "adamw"), (12, "muon")):
        Trainer(config_for(tmp_path, steps=steps, optim={"kind": kind, "lr": 3e-3}), tiny_model(), batches()).run()
    assert losses(tmp_path).keys() == set(range(1, 13))


def test_a_frozen_part_that_changed_is_noticed(tmp_path: Path) -> None:
    config = config_for(tmp_path, steps=4, tower={"train": False})
    Trainer(config, tiny_model(), batches()).run()
    config.steps = 8
    with pytest.raises(TrainingError, match="frozen weights differ"):
        Trainer(config, tiny_model(seed=1), batches()).run()


class _Poisoned(SampleBatches):
    """Batch 6 gives a loss that is not a number, once."""

    def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Any]:
        for number, batch in enumerate(super().stream(start, rank, world), start):
            if number == 6:
                batch = {**batch, "pixel_values": torch.full(batch["pixel_values"].shape, torch.nan)}
            yield batch


def test_a_loss_that_is_no_number_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    trainer = Trainer(config_for(tmp_path), tiny_model(), _Poisoned(Colours(), 8, PAD))
    with pytest.raises(TrainingError, match=r"Step 7: the loss is nan.*micro-batches are 6 … 6.*step-0000006"):
        trainer.run()
    assert trainer.checkpoints.steps() == [4, 6]
    result = Trainer(config_for(tmp_path), tiny_model(), batches()).run()
    assert result.finished and losses(tmp_path).keys() == set(range(1, 13))


def test_a_step_without_answers_is_refused(tmp_path: Path) -> None:
    class Unanswered(Colours):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            sample.labels.fill_(-100)
            return sample

    with pytest.raises(TrainingError, match="no token to learn"):
        Trainer(config_for(tmp_path), tiny_model(), SampleBatches(Unanswered(), 4, PAD)).run()


def test_everything_frozen_is_refused(tmp_path: Path) -> None:
    frozen = {part: {"train": False} for part in ("tower", "connector", "text")}
    with pytest.raises(TrainingError, match="Nothing is left to train"):
        Trainer(config_for(tmp_path, **frozen), tiny_model(), batches())


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    class Second(SampleBatches):
        def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Any]:
            with pytest.raises(TrainingError, match="Another process is training"):
                Trainer(config_for(tmp_path), tiny_model(), batches()).run()
            return super().stream(start, rank, world)

    assert Trainer(config_for(tmp_path, steps=1), tiny_model(), Second(Colours(), 4, PAD)).run().finished


def test_batches_are_numbered_and_shared_out() -> None:
    source = batches()
    first = [batch["input_ids"] for batch, _ in zip(source.stream(0), range(6), strict=False)]
    from_three = next(iter(source.stream(3)))["input_ids"]
    assert torch.equal(first[3], from_three)
    odd = [batch["input_ids"] for batch, _ in zip(source.stream(2, rank=1, world=2), range(2), strict=False)]
    assert torch.equal(odd[0], first[3]) and torch.equal(odd[1], first[5])


def test_workers_give_the_same_batches() -> None:
    here = [batch for batch, _ in zip(batches().stream(5), range(4), strict=False)]
    there = [batch for batch, _ in zip(batches(workers=2).stream(5), range(4), strict=False)]
    for mine, other in zip(here, there, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_finite_dataset_is_shuffled_anew_each_epoch() -> None:
    class Few(Colours):
        def __len__(self) -> int:
            return 10

    source = SampleBatches(Few(), 5, PAD, seed=3)
    epochs = [[source._index(place) for place in range(start, start + 10)] for start in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]


def test_wrong_fields_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"steps = 0: .* 1; there is no field optim\.rate"):
        TrainConfig(run="x", steps=0, optim={"rate": 1})
    with pytest.raises(ConfigurationError, match="the field run is missing"):
        TrainConfig()


def test_yaml_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("run: somewhere\noptim: {lr: 1.0e-3}\n")
    config = TrainConfig.load(file, ["optim.lr=2e-4", "steps=7", "tower.train=false", "log.trackers=[tensorboard]"])
    assert (config.optim.lr, config.steps, config.tower.train, config.log.trackers) == (2e-4, 7, False, ["tensorboard"])
    file.write_text(config.dump())
    assert TrainConfig.load(file) == config
    with pytest.raises(ConfigurationError, match="key=value"):
        TrainConfig.load(file, ["steps"])


def test_recomputing_activations_changes_nothing_but_memory(tmp_path: Path) -> None:
    for name, on in (("kept", False), ("recomputed", True)):
        config = config_for(tmp_path / name, steps=3, activation_checkpointing=on)
        Trainer(config, tiny_model(), batches()).run()
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")


def test_z_loss_pulls_log_z_to_zero_and_stays_out_of_the_logged_loss() -> None:
    logits = torch.randn(6, 9) + 5
    targets = torch.arange(6)
    total, entropy = token_loss(logits, targets, z_loss=0.1)
    log_z = torch.log(torch.exp(logits).sum(-1))
    assert entropy.item() == pytest.approx((log_z - logits[range(6), targets]).sum().item(), rel=1e-5)
    assert (total - entropy).item() == pytest.approx(0.1 * (log_z**2).sum().item(), rel=1e-4)


def test_schedules_rise_and_fall_where_they_should() -> None:
    def rates(**changes: Any) -> list[float]:
        optim = OptimConfig(**changes)
        return [rate_at(step, 100, optim) for step in range(1, 101)]

    cosine = rates(schedule="cosine", warmup=10)
    assert cosine[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11]) and max(cosine) < 1.001
    assert cosine[-1] < 0.001 and cosine[54] == pytest.approx(0.5, abs=0.02)
    wsd = rates(schedule="wsd", warmup=0.1, decay=0.2, min_lr=0.1)
    assert wsd[10:79] == [1.0] * 69 and wsd[90] == pytest.approx(0.1 + 0.9 * 0.48, abs=0.02) and 0.1 < wsd[-1] < 0.16
    assert rates(schedule="constant", warmup=0) == [1.0] * 100
