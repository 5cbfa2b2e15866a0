"""``smolvlm train``: from a configuration to a trained checkpoint.

config ─▶ model and processor ─▶ preflight: plan and report ─▶ Trainer ─▶ final/ (weights, config, processor files)
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smolvlm_fms.bundle import folder_of
from smolvlm_fms.errors import ConfigurationError, TrainingError
from smolvlm_fms.fms_bridge.loading import load_model, resolve_folder
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.processing.factory import load_processor
from smolvlm_fms.training.checkpoint import write_atomically
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.conversation import Encoder
from smolvlm_fms.training.evaluate import Evaluator
from smolvlm_fms.training.feed import PlannedBatches, read_samples
from smolvlm_fms.training.parallel import Group, started
from smolvlm_fms.training.preflight import Report, epoch_draws, preflight
from smolvlm_fms.training.trainer import Trainer, TrainResult, pick_device

__all__ = ["prepare", "train"]

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = {
    "run", "log", "eval", "checkpoint", "stop_after_minutes", "steps", "epochs", "device", "compile",
    "activation_checkpointing", "parallel",
}  # fmt: skip
"""Fields that may change when a run resumes, because they do not decide what is computed from what."""


def train(config: TrainConfig, say: Callable[[str], object] = print) -> TrainResult:
    """Run a configuration to its end, or go on where its run folder stands. ``say`` gets the preflight report."""
    with started(pick_device(config.device)) as group:
        trainer, report = prepare(config, group)
        if group.is_first:
            for line in report.lines():
                say(line)
        return trainer.run()


def prepare(config: TrainConfig, group: Group | None = None) -> tuple[Trainer, Report]:
    """Everything up to the first step. Raises TrainingError where that step would make no sense."""
    group = group or Group(device=pick_device(config.device))
    if config.model is None:
        raise ConfigurationError("model is missing; name the checkpoint folder (or hub id) to start from.")
    check_unchanged(config)
    folder = resolve_folder(folder_of(config.model))
    if config.lora is not None and config.parallel.tensor > 1:
        raise ConfigurationError("lora and parallel.tensor do not go together; adapters need little memory as it is.")
    changes: dict[str, Any] = {"fused_weights": False} if config.lora or config.parallel.tensor > 1 else {}
    model = load_model(folder, dtype=torch.float32, **changes)
    if config.lora is not None:
        from smolvlm_fms.training.lora import add_adapters

        torch.manual_seed(config.seed)
        add_adapters(model, config.lora)
    processor = load_processor(folder, **config.data.image)
    tokenizer = processor.tokenizer
    encoder = Encoder(processor, config.data.max_length, config.data.too_long == "cut")
    config.run.mkdir(parents=True, exist_ok=True)
    if not group.is_first:
        group.wait()  # the first process measures the data, the others read what it found
    plan, report = preflight(config.data, encoder, config.seed, config.run / "preflight")
    if group.is_first:
        group.wait()
    if config.epochs is not None:
        config.steps = count_steps(config, plan, report)
    if group.is_first:
        write_atomically(config.run / "preflight.json", json.dumps(asdict(report), indent=1, ensure_ascii=False))
    pad = _pad_token(tokenizer, model)
    evaluator = None
    if config.data.eval:
        samples = read_samples(config.data.eval, encoder, max(config.eval.loss_samples, config.eval.generations))
        ends = getattr(processor, "end_of_utterance_token", None)
        stop = {tokenizer.eos_token_id, None if ends is None else tokenizer.convert_tokens_to_ids(ends)} - {None}
        evaluator = Evaluator(samples, lambda ids: str(tokenizer.decode(ids, True)), stop, pad, config.eval)
    batches = PlannedBatches(plan, encoder, pad, config.data.workers)
    final = _Final(config, processor, str(config.model))
    trainer = Trainer(config, model, batches, evaluate=evaluator, save_final=final, group=group)
    return trainer, report


def count_steps(config: TrainConfig, plan: Any, report: Report) -> int:
    """Optimizer steps in ``config.epochs`` passes over the data."""
    assert config.epochs is not None
    if report.batches is None:
        raise ConfigurationError("epochs needs data of known size; with a stream, give steps.")
    batches: int = plan.count(max(1, math.ceil(config.epochs * epoch_draws(plan))))
    return max(1, math.ceil(batches / config.accumulate))


def check_unchanged(config: TrainConfig) -> None:
    """Raise TrainingError where the run folder belongs to a run that would compute something else."""
    file = config.run / "config.yaml"
    if not file.exists() or not any((config.run / "checkpoints").glob("step-*")):
        return
    before, now = (_deciding(one) for one in (TrainConfig.load(file), config))
    differ = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    if differ:
        raise TrainingError(
            f"{config.run} holds a run with other settings: {', '.join(sorted(differ))}. Choose another run, or give "
            f"the settings that are in {file}."
        )


class _Final:
    """Writes ``final/``: the checkpoint (adapters merged), the processor's files, and the adapter by itself."""

    def __init__(self, config: TrainConfig, processor: Any, base: str) -> None:
        self.config = config
        self.processor = processor
        self.base = base

    def __call__(self, model: nn.Module, folder: Path) -> None:
        if self.config.lora is not None:
            from smolvlm_fms.training.lora import fold_adapters, save_adapter

            save_adapter(model, self.config.lora, folder / "adapter", self.base)
            fold_adapters(model)
        save_pretrained(model, folder, dtype=torch.bfloat16 if self.config.precision == "bfloat16" else None)
        self.processor.save_pretrained(folder)


def _pad_token(tokenizer: Any, model: Any) -> int:
    for value in (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def _deciding(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide what a run computes, flat."""
    values = config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    values["data"].pop("workers")
    # Split layers have unfused linears, and checkpoints have them as they are.
    values["parallel.tensor > 1"] = config.parallel.tensor > 1
    return _leaves(values)


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _leaves(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
