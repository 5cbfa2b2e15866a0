"""Tokens a second in training, beside transformers' Trainer on the same checkpoint, samples and samples a step.

    python benchmarks/train.py [--size small|256m] [--steps 12] [--threads 2] [--compile]

Both train every weight under bfloat16 autocast (``--precision float32``: without) with fused AdamW on the CPU. The
samples (a picture of one or several tiles, a question, an answer of very different lengths) are made beforehand and are
in memory for both, so what is measured is the training step alone. Tokens are real ones; padding does not count.
``--clock cpu`` counts processor time (with ``--threads 1``: on a machine that others use, too).
``--compile`` adds our trainer with compiled blocks. The losses of the first step show that all do the same work. Rounds
take turns. Ends in one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.config_presets import PRESETS
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.model.smolvlm import SmolVLM
from smolvlm_fms.training import IGNORE, Sample, TrainConfig, Trainer, collate
from smolvlm_fms.training.plan import pack_rows
from smolvlm_fms.training.samples import collate_packed

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.monotonic, "cpu": time.process_time}


def configuration(size: str) -> SmolVLMConfig:
    if size == "256m":
        return PRESETS["256m_instruct"]
    vision = VisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=192,
        patch_size=16,
    )
    text = TextConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5,
    )  # fmt: skip
    return SmolVLMConfig(vision, text, scale_factor=2, image_token_id=8190, pad_token_id=2)


def make_samples(config: SmolVLMConfig, count: int) -> list[Sample]:
    """Conversations of 1 … 5 tiles; questions of 10 … 40 tokens, answers of 5 … 400 (most of them short)."""
    draw, made = random.Random(0), []
    torch.manual_seed(0)
    side = config.vision.image_size
    for _ in range(count):
        tiles = draw.choice([1, 1, 1, 2, 5])
        question, answer = draw.randint(10, 40), min(400, int(draw.lognormvariate(3.3, 1.0)) + 5)
        prompt = torch.cat([
            torch.full((tiles * config.tokens_per_tile,), config.image_token_id), torch.randint(10, 8000, (question,)),
        ])  # fmt: skip
        said = torch.randint(10, 8000, (answer,))
        labels = torch.cat([torch.full_like(prompt, IGNORE), said])
        made.append(Sample(torch.cat([prompt, said]), labels, torch.randn(tiles, 3, side, side)))
    return made


class Packed:
    """Each step's samples, packed into rows; what the trainer's own plan does with samples from files."""

    def __init__(self, samples: list[Sample], per_step: int, pad: int, clock: Callable[[], float]) -> None:
        self.samples, self.per_step, self.pad, self.clock = samples, per_step, pad, clock
        self.starts: list[float] = []

    def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Any]:
        for number in range(start + rank, 10**9, world):
            self.starts.append(self.clock())
            first = number * self.per_step % len(self.samples)
            step = self.samples[first : first + self.per_step]
            lengths = [sample.length for sample in step]
            yield collate_packed([[step[i] for i in row] for row in pack_rows(lengths, max(2048, *lengths))], self.pad)


def ours(
    folder: Path, samples: list[Sample], args: argparse.Namespace, run: Path, compile: bool = False
) -> tuple[list[float], float]:
    """Seconds of each step after the warm-up, and the first step's loss."""
    model = load_model(folder, dtype=torch.float32)
    config = TrainConfig(
        run=run, steps=args.steps + args.warmup, precision=args.precision, device="cpu",
        log={"bar": False, "trackers": []}, checkpoint={"every": 10**6}, optim={"schedule": "constant", "warmup": 0},
        compile=compile,
    )  # fmt: skip
    clock = CLOCKS[args.clock]
    batches = Packed(samples, args.batch, 2, clock)
    trainer = Trainer(config, model, batches)
    trainer.save = lambda required=False: None  # type: ignore[method-assign] - no checkpoint belongs to the figure
    trainer.run()
    ended = clock()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [end - start for start, end in pairwise([*batches.starts, ended][args.warmup :])], lines[0]["loss"]


def theirs(folder: Path, samples: list[Sample], args: argparse.Namespace, run: Path) -> tuple[list[float], float]:
    """The same for transformers' Trainer."""
    from transformers import PrinterCallback, SmolVLMForConditionalGeneration, TrainerCallback, TrainingArguments
    from transformers import Trainer as TheirTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(CLOCKS[args.clock]())

    def batch(step: list[dict[str, Sample]]) -> dict[str, Any]:
        made = collate([one["sample"] for one in step], 2)
        mask = made.pop("segments")
        counts = torch.tensor([len(one["sample"].pixel_values) for one in step])  # type: ignore[arg-type]
        real = torch.arange(int(counts.max()))[None] < counts[:, None]
        side = made["pixel_values"].shape[-1]
        made["pixel_attention_mask"] = real.long()[..., None, None].expand(-1, -1, side, side)
        return {**made, "attention_mask": mask}

    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    clock = Clock()
    options = TrainingArguments(
        output_dir=str(run), max_steps=args.steps + args.warmup, per_device_train_batch_size=args.batch, use_cpu=True,
        bf16=args.precision == "bfloat16", optim="adamw_torch_fused", lr_scheduler_type="constant", save_strategy="no",
        logging_steps=1, report_to=[], remove_unused_columns=False, disable_tqdm=True, 
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"sample": sample} for sample in samples]
    trainer = TheirTrainer(model, options, data_collator=batch, train_dataset=data, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return [end - start for start, end in pairwise(clock.ends[args.warmup - 1 :])], first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["small", "256m"], default="small")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that count")
    parser.add_argument("--batch", type=int, default=16, help="samples a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = configuration(args.size)
    samples = make_samples(config, args.batch * (args.steps + args.warmup))
    tokens = [sum(s.length for s in samples[i : i + args.batch]) for i in range(0, len(samples), args.batch)]
    tokens = tokens[args.warmup :]
    contenders: dict[str, Any] = {"smolvlm": ours, "transformers": theirs}
    if args.compile:
        contenders["smolvlm_compiled"] = partial(ours, compile=True)
    speeds: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        model = SmolVLM(config)
        model.reset_parameters()
        model.post_init()
        save_pretrained(model, Path(scratch) / "model")
        for number in range(args.rounds):
            for name, train in contenders.items():
                seconds, loss = train(Path(scratch) / "model", samples, args, Path(scratch) / f"{name}-{number}")
                first[name] = round(loss, 4)
                speeds.setdefault(name, []).extend(n / took for n, took in zip(tokens, seconds, strict=True))
                if {"smolvlm", "transformers"} <= speeds.keys():
                    print("so far:", report(args, speeds, first), file=sys.stderr, flush=True)
    print(report(args, speeds, first))


def report(args: argparse.Namespace, speeds: dict[str, list[float]], first: dict[str, float]) -> str:
    """The result as one JSON object."""
    import transformers

    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {"tokens_per_s_vs_transformers_trainer": round(medians["smolvlm"] / medians["transformers"], 3)}
    if "smolvlm_compiled" in medians:
        ratios["tokens_per_s_compiled_vs_eager"] = round(medians["smolvlm_compiled"] / medians["smolvlm"], 3)
    return json.dumps({
        "benchmark": "train", "size": args.size, "batch": args.batch, "precision": args.precision,
        "threads": args.threads, "clock": args.clock, "steps": len(speeds["smolvlm"]),
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "first_loss": first, "ratios": ratios,
    })  # fmt: skip


if __name__ == "__main__":
    main()
