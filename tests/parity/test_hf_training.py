"""transformers' Trainer, peft's LoRA and TRL's SFTTrainer: the adapted model's losses are the plain model's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf import to_hf_api
from tests.tiny_models import build_checkpoint, load_peer, make_batch

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("training"), "smolvlm")


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Eight samples of one or two tiles; labels on the second half of each."""
    batch = make_batch(folder, [1, 2, 1, 2, 1, 2, 1, 2], words=8)
    labels = batch["input_ids"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    return [{**{k: v[i] for k, v in batch.items()}, "labels": labels[i]} for i in range(len(labels))]


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}


def losses(trainer_class: Any, arguments_class: Any, model: Any, samples: Any, folder: Path, **options: Any) -> Any:
    """Train a few steps; the logged losses."""
    arguments = _quietly(
        arguments_class,
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options.pop("arguments", {}),
    )
    trainer = _quietly(
        trainer_class, model=model, args=arguments, train_dataset=samples, data_collator=collate, **options
    )
    _quietly(trainer.train)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call without the deprecation warnings that transformers, accelerate, peft and TRL give each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def assert_learns_alike(mine: list[float], reference: list[float]) -> None:
    assert len(mine) == len(reference) == STEPS
    assert mine == pytest.approx(reference, rel=1e-3)
    assert mine[-1] < mine[0]


def test_trainer(folder: Path, samples: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    ours = losses(Trainer, TrainingArguments, to_hf_api(load_model(folder)).train(), samples, tmp_path)
    theirs = losses(Trainer, TrainingArguments, load_peer(folder).train(), samples, tmp_path)
    assert_learns_alike(ours, theirs)


def test_lora(folder: Path, samples: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    targets = {
        "ours": r".*text_model.*in_proj\.(query|value)",
        "theirs": r".*text_model.*self_attn\.(q_proj|v_proj)",
    }
    models = {"ours": to_hf_api(load_model(folder, fused_weights=False)).train(), "theirs": load_peer(folder).train()}
    results = {}
    for name, model in models.items():
        adapted = _quietly(get_peft_model, model, LoraConfig(r=4, lora_alpha=8, target_modules=targets[name]))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # the same A for both; B starts at zero. Layers come in the same order.
            lora_a = [p for n, p in sorted(adapted.named_parameters()) if "lora_A" in n]
            for weight in lora_a:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        assert len(lora_a) == 6
        results[name] = losses(Trainer, TrainingArguments, adapted, samples, tmp_path)
    assert_learns_alike(results["ours"], results["theirs"])


def test_trl(folder: Path, samples: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import SFTConfig, SFTTrainer
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.tiny import build_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(build_tokenizer(tmp_path / "tokenizer"))
    rows = Dataset.from_list([{n: v.tolist() for n, v in sample.items()} for sample in samples])
    options = {
        "processing_class": tokenizer,
        "arguments": {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False},
    }
    models = (to_hf_api(load_model(folder)).train(), load_peer(folder).train())
    ours, theirs = (
        losses(SFTTrainer, SFTConfig, model, rows, tmp_path, **{**options, "arguments": dict(options["arguments"])})
        for model in models
    )
    assert_learns_alike(ours, theirs)
