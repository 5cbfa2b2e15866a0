"""transformers' Trainer, peft's LoRA and TRL's SFTTrainer: the adapted model's losses are the plain model's.

And our own trainer: on samples of every kind its losses are those of transformers' model in a plain loop.
"""

from __future__ import annotations

import json
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf import to_hf_api
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.run import prepare
from tests.tiny import build_tokenizer
from tests.tiny_llava import build_llava, load_llava_peer
from tests.tiny_models import build_checkpoint, load_peer, make_batch
from tests.unit.test_train_run import settings
from tests.unit.training_helpers import read_lines, tiny_checkpoint
from tests.videos import make_video

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


def write_mixed(folder: Path, videos: bool) -> Path:
    """Words alone, one picture, two pictures of other shapes and (where the model knows them) a video, twice each."""
    folder.mkdir()
    for number, size in enumerate([(60, 40), (33, 90), (50, 50)]):
        Image.new("RGB", size, (80 * number, 120, 60)).save(folder / f"{number}.png")
    (folder / "clip.mp4").write_bytes(make_video(30, fps=10))
    image = [{"type": "image", "path": f"{number}.png"} for number in range(3)]
    kinds = [[], [image[0]], [image[1], image[2]], [{"type": "video", "path": "clip.mp4"}]][: 4 if videos else 3]
    lines = []
    for parts in kinds * 2:
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What is shown?"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": "colour " * (1 + len(lines) % 3)}]}
        lines.append(json.dumps({"messages": [asked, said]}))
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "mixed.jsonl"


def assert_same_curve(peer: Any, base: Path, data: Path, run: Path, **peer_inputs: Any) -> None:
    """Our trainer packs samples into rows; transformers' model sees each by itself; losses and norms are equal."""
    changes: dict[str, Any] = {
        "steps": STEPS, "optim": {"lr": 3e-3, "schedule": "constant", "warmup": 0, "weight_decay": 0.0},
        "data": {"max_length": 512, "rows": 2, "window": 8}, "accumulate": 2,
    }  # fmt: skip
    trainer, report = prepare(TrainConfig(**settings(run, base, data, **changes)))
    assert report.sources[0].dropped == {}
    plan = trainer.batches.plan  # type: ignore[attr-defined]
    encoder, source = trainer.batches.make.encoder, plan.sources[0].source  # type: ignore[attr-defined]
    steps = [list(pair) for pair in zip(*[islice(plan.batches(), 2 * STEPS)] * 2, strict=True)]
    trainer.run()
    ours = read_lines(run / "metrics.jsonl")
    optimizer = torch.optim.AdamW(peer.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batches in enumerate(steps):
        samples = [encoder.encode(source.read(draw.item)) for batch in batches for row in batch for draw in row]
        targets = sum(sample.targets for sample in samples)
        losses = []
        for sample in samples:
            inputs = {"input_ids": sample.input_ids[None], "labels": sample.labels[None]}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if sample.image_sizes is not None:
                counts = [peer_inputs["tiles"](tuple(size)) for size in sample.image_sizes.tolist()]
                pictures = sample.pixel_values.split(counts)
                padded = torch.nn.utils.rnn.pad_sequence(list(pictures), batch_first=True)
                inputs |= {"pixel_values": padded, "image_sizes": sample.image_sizes}
            elif sample.pixel_values is not None:
                inputs["pixel_values"] = sample.pixel_values[None]
            loss = peer(**inputs).loss * sample.targets / targets
            loss.backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step]["loss"] == pytest.approx(sum(losses), rel=1e-4), f"step {step + 1}"
        assert ours[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-3), f"step {step + 1}"
    assert ours[-1]["loss"] < ours[0]["loss"]


def test_our_trainer_smolvlm(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    peer = load_peer(base).train()
    assert_same_curve(peer, base, write_mixed(tmp_path / "data", videos=True), tmp_path / "run")
    from transformers import AutoModelForImageTextToText

    final, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run" / "final", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), "loaders that take tensors by name find each, and no other"
    trained = load_model(tmp_path / "run" / "final")
    ids = torch.arange(20, 40)[None]
    assert torch.allclose(final(ids).logits, trained(ids), atol=1e-4)


@pytest.mark.parametrize("family", ["granite", "mistral"])
def test_our_trainer_llava_next(tmp_path: Path, family: str) -> None:
    base = build_llava(tmp_path / "base", family)
    build_tokenizer(base)
    (base / "preprocessor_config.json").write_text(json.dumps(LLAVA_PICTURES))
    peer = load_llava_peer(base).train()
    model = load_model(base)
    if family == "granite":  # transformers' LLaVA-Next leaves Granite's divisor of the logits out
        peer.lm_head.register_forward_hook(lambda _, __, logits: logits / model.config.text.logits_scaling)
    data = write_mixed(tmp_path / "data", videos=False)
    assert_same_curve(peer, base, data, tmp_path / "run", tiles=model.config.resolution.num_tiles)
    trained = dict(load_llava_peer(tmp_path / "run" / "final").named_parameters())
    before = load_llava_peer(base).named_parameters()  # with the towers' unused heads, which ours do not have
    moved = " ".join(name for name, old in before if name in trained and not torch.equal(old, trained[name]))
    assert all(part in moved for part in ("vision_tower", "projector", "image_newline", "language_model"))


LLAVA_PICTURES = {
    "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 30},
    "crop_size": {"height": 30, "width": 30},
    "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]],
}  # fmt: skip
