"""Does the converted model compute what its source computes? Cases, comparison, and what is printed of it.

A *forward* here is a function from a case's inputs (token ids, pixels …) to logits (1, T, V): the source's is this
package's model, the target's whatever reads the converted files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smolvlm_fms.engine.machine import available_memory
from smolvlm_fms.processing.factory import load_processor

__all__ = ["BOUND", "Case", "Check", "Forward", "compare", "for_checking", "greedy", "make_cases", "same_tensors"]

BOUND = 1e-4
"""fp32 logits of two implementations may differ by this share of the largest one: rounding, over some thirty layers."""

TOKENS = 12
"""Greedy tokens that both sides must agree on, in every case."""

Inputs = Mapping[str, Tensor]
Forward = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Check:
    """One comparison with the source: the largest absolute difference (None where there is none to measure), the share
    of tokens or tensors that agree, the verdict, and a word about what was compared."""

    name: str
    max_abs: float | None
    agree: float
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A prompt, with or without a picture, as the model's arguments."""

    name: str
    inputs: dict[str, Tensor]


def make_cases(folder: Path, config: Any) -> list[Case]:
    """A question without a picture and one with a picture of one tile, through the checkpoint's own processor.

    A folder without a tokenizer gets random tokens and noise instead.
    """
    if not (folder / "tokenizer.json").is_file():
        return _random_cases(config)
    processor = load_processor(folder)
    y, x = np.mgrid[0:160, 0:200]
    planes = [np.sin(x / 23) * 90, np.cos(y / 31) * 90, ((x // 40 + y // 40) % 2) * 120.0]
    picture = Image.fromarray((np.stack(planes, -1) + 110).clip(0, 255).astype(np.uint8))

    def inputs(pictures: list[Image.Image], question: str) -> dict[str, Tensor]:
        parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        media: dict[str, Any] = {"images": [pictures]} if pictures else {}
        if pictures and hasattr(config, "scale_factor"):
            media["do_image_splitting"] = False  # one tile says as much as seventeen, in a seventeenth of the time
        batch = processor(text=[text], return_tensors="pt", **media)
        return {name: torch.as_tensor(value) for name, value in batch.items()}

    return [
        Case("text", inputs([], "What is the capital of France?")),
        Case("picture", inputs([picture], "What is this?")),
    ]


def _random_cases(config: Any) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    special = config.image_token_id
    ids = torch.randint(3, config.text.vocab_size, (1, 24), generator=generator)
    ids[ids == special] = 3
    cases = [Case("text", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})]
    if not hasattr(config, "scale_factor"):
        return cases
    ids = torch.cat((ids, torch.full((1, config.tokens_per_tile), special), ids.flip(1)), 1)
    side = config.vision.image_size
    pixels = torch.rand(1, 1, config.vision.num_channels, side, side, generator=generator) * 2 - 1
    mask = torch.ones(1, 1, side, side, dtype=torch.long)
    more = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels, "pixel_attention_mask": mask}
    return [*cases, Case("picture", {"input_ids": ids, **more})]


def for_checking(model: Any) -> Any:
    """The model in fp32, in place, where that fits into memory twice; else as it is."""
    count = sum(weight.numel() for weight in model.parameters())
    return model.float() if 2 * 4 * count < available_memory() else model


@torch.no_grad()
def greedy(model: Any, inputs: Inputs, tokens: int = TOKENS) -> tuple[Inputs, int]:
    """``inputs`` with ``tokens`` greedy tokens of our ``model`` behind, and the length of the prompt."""
    ids = inputs["input_ids"]
    logits, cache = model(**_as(model, inputs), use_cache=True, last_n_tokens=1)
    generated = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(tokens - 1):
        logits, cache = model(generated[-1], past_key_value_states=cache, use_cache=True)
        generated.append(logits[:, -1].argmax(-1, keepdim=True))
    longer = torch.cat((ids, *generated), 1)
    return {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}, ids.shape[1]


def own_forward(model: Any) -> Forward:
    """Our model as a Forward."""

    @torch.no_grad()
    def forward(inputs: Inputs) -> Tensor:
        logits: Tensor = model(**_as(model, inputs))
        return logits

    return forward


def _as(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    dtype = next(model.parameters()).dtype
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def compare(
    source: Any, target: Forward, cases: list[Case], *, what: str = "", bound: float | None = BOUND
) -> list[Check]:
    """Logits and greedy text of ``target`` against those of our model ``source``, case by case.

    The target is shown the source's prompt and greedy tokens; where its likeliest next token is the source's at each
    of those places, it would have written the same text. A place where the source's two likeliest tokens are nearer to
    each other than the allowed difference decides nothing.
    bound: allowed difference as a share of the largest logit; None: differences are reported, and nothing fails.
    """
    checks = []
    forward = own_forward(source)
    for case in cases:
        inputs, length = greedy(source, case.inputs)
        reference, found = forward(inputs).float()[0], target(inputs).float()[0]
        difference = float((reference - found).abs().max())
        allowed = float("inf") if bound is None else bound * float(reference.abs().max())
        best = reference.topk(2, -1).values
        # By value: in bfloat16 several tokens are often equally likely, and any of them is right.
        same = reference.gather(-1, found.argmax(-1, keepdim=True))[:, 0] == best[:, 0]
        tie = (best[:, 0] - best[:, 1] <= 2 * allowed) & torch.tensor(bound is not None)
        written = slice(length - 1, None)
        text = bool((same | tie)[written].all())
        note = f"allowed {allowed:.1e}" if bound is not None else "for information"
        ok = bound is None or difference <= allowed
        checks.append(Check(f"{what}{case.name}: logits", difference, float(same.float().mean()), ok, note))
        agree = float(same[written].float().mean())
        checks.append(Check(f"{what}{case.name}: greedy text", None, agree, bound is None or text, note[:0]))
    return checks


def same_tensors(name: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Check:
    """Whether two state dicts hold the same names and the same values, to the bit."""
    names = wanted.keys() & found.keys()
    largest, equal = 0.0, 0
    for key in names:
        ours, theirs = wanted[key], found[key]
        if ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            equal += 1
        elif ours.shape == theirs.shape:
            largest = max(largest, float((ours.float() - theirs.float()).abs().max()))
        else:
            largest = float("inf")
    total = len(wanted.keys() | found.keys())
    return Check(name, largest, equal / total, equal == total, f"{equal} of {total} tensors equal")
