"""Whether a checkpoint bears an 8-bit tower (``quantize_tower="int8"``): measured on pictures, nothing calibrated.

The tower's weights then have a scale an output and its activations a scale a patch, taken from the values at hand, so
there is nothing to calibrate; how much is lost depends on the checkpoint's outliers, and this says how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smolvlm_fms.bundle import bundled
from smolvlm_fms.engine.api import load

__all__ = ["TowerReport", "check_int8_tower"]


@dataclass(frozen=True)
class TowerReport:
    """Means over pictures. Errors are of image features, RMS of the difference to fp32 over RMS of fp32.

    tokens_agree: the share of answer tokens before the two towers' answers part, against the bf16 tower; answers_agree:
    the share of answers that are equal whole.
    """

    pictures: int
    bf16_error: float
    int8_error: float
    worst_int8_error: float
    tokens_agree: float
    answers_agree: float


def check_int8_tower(
    name: str | Path,
    pictures: Sequence[Any] = (),
    question: str = "What is in the picture?",
    *,
    max_tokens: int = 16,
    quantize: str | None = None,
) -> TowerReport:
    """Compare the int8 tower of the checkpoint ``name`` with bf16 and fp32, on ``pictures`` (by default bundled ones).

    question, max_tokens: of the answers that are compared, greedily. quantize: how the text model is loaded beside it.
    One tile a picture. Three models are loaded, one after another.
    Raises what ``load`` raises, also where the engine's packed path does not compute this checkpoint.
    """
    shown = [Image.open(p).convert("RGB") for p in sorted(bundled("pictures").glob("*.png"))]
    shown = list(pictures) or shown
    exact, _ = _look(load(name, dtype="float32", packed=False), shown, question, 0)
    plain, said = _look(load(name, dtype="bfloat16", quantize=quantize), shown, question, max_tokens)
    small, quick = _look(
        load(name, dtype="bfloat16", quantize=quantize, quantize_tower="int8"), shown, question, max_tokens
    )
    errors = [_error(features, wanted) for features, wanted in zip(small, exact, strict=True)]
    shares = [_agreement(ours, theirs) for ours, theirs in zip(quick, said, strict=True)]
    return TowerReport(
        pictures=len(shown),
        bf16_error=sum(_error(f, w) for f, w in zip(plain, exact, strict=True)) / len(shown),
        int8_error=sum(errors) / len(errors),
        worst_int8_error=max(errors),
        tokens_agree=sum(shares) / len(shares),
        answers_agree=sum(a == b for a, b in zip(quick, said, strict=True)) / len(shown),
    )


@torch.inference_mode()
def _look(
    vlm: Any, pictures: Sequence[Any], question: str, max_tokens: int
) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Every picture's features in fp32, and the tokens of its answer."""
    dtype = vlm.model.text_model.base_model.dec_norm.weight.dtype
    features, answers = [], []
    whole = {"do_image_splitting": False} if hasattr(vlm.model.config, "scale_factor") else {}
    for picture in pictures:
        batch = vlm.processor.image_processor(picture, return_tensors="pt", **whole)
        names = ("pixel_values", "pixel_attention_mask", "image_sizes")
        inputs = {name: torch.as_tensor(batch[name]) for name in names if name in batch}
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        found = vlm.model.encode_images(**inputs).features
        features.append(torch.cat([f.flatten(0, -2) for f in found] if isinstance(found, list) else [found]).float())
        if max_tokens:
            answers.append(vlm.ask(picture, question, detail="low", max_tokens=max_tokens, temperature=0).tokens)
    return features, answers


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of the longer answer's tokens that come before the first difference."""
    longest = max(len(ours), len(theirs))
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return same / longest if longest else 1.0
