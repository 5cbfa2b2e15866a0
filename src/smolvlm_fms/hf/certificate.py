"""``smolvlm verify``: does this checkpoint give transformers' results here? Pixels, ids, features, logits, text.

Both libraries get the same pictures and questions. Each check compares one stage, and from the features on both models
get the very same tensors, so that a difference is reported where it arises.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smolvlm_fms.bundle import folder_of
from smolvlm_fms.errors import CheckpointError, MissingDependencyError
from smolvlm_fms.fms_bridge.loading import load_model, resolve_folder

__all__ = ["Check", "verify"]

LOGIT_TOLERANCE = 1e-4
"""fp32: what different orders of summation add up to over some thirty layers; argmax must agree besides."""

PIXEL_TOLERANCE = 1.01 * 2 / 255
"""One level of rounding of an 8-bit pixel, after normalisation with a standard deviation of 0.5."""


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute difference, the share of elements (or tokens) that agree, the verdict."""

    name: str
    max_abs: float
    agree: float
    ok: bool


def verify(model: str | Path, new_tokens: int = 24) -> dict[str, Any]:
    """Compare a checkpoint (folder or hub id) with transformers, in fp32 on the CPU.

    Returns ``{"ok", "model", "checks": [{"name", "max_abs", "agree", "ok"}], "versions"}``; see :class:`Check`.
    """
    import transformers
    from transformers import AutoModelForImageTextToText

    if int(transformers.__version__.split(".")[0]) < 5:
        raise MissingDependencyError(
            f"verify compares in fp32 and needs transformers 5; {transformers.__version__} is here. It gives "
            "full tiles wrong position ids in fp32, so a difference from it would say nothing."
        )
    folder = resolve_folder(folder_of(model))
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    # transformers' LLaVA-Next leaves Granite's division of the logits out; the comparison is of everything else.
    changes: dict[str, Any] = {"scale_logits": False} if theirs.config.model_type == "llava_next" else {}
    ours = load_model(folder, dtype=torch.float32, **changes).eval()
    processors = _processors(folder)
    checks: list[Check] = []
    with torch.no_grad():
        for name, pictures, messages in _cases():
            checks += _compare(name, pictures, messages, ours, theirs, processors, new_tokens)
    return {
        "ok": all(check.ok for check in checks),
        "model": str(model),
        "checks": [asdict(check) for check in checks],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a parity certificate depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("smolvlm-fms", "torch", "transformers", "ibm-fms", "tokenizers", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cases() -> Iterator[tuple[str, list[Image.Image], list[dict[str, Any]]]]:
    """Names, pictures and conversations: no picture, a small, a wide and a tall one, and two at once."""
    rng = np.random.default_rng(7)

    def picture(width: int, height: int) -> Image.Image:
        """Smooth colours with hard edges and some noise: every resampling shows its rounding on it."""
        y, x = np.mgrid[0:height, 0:width]
        planes = [np.sin(x / 23) * 90, np.cos(y / 31) * 90, ((x // 40 + y // 40) % 2) * 120.0]
        pixels = np.stack(planes, -1) + 110 + rng.normal(0, 12, (height, width, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def ask(count: int, question: str) -> list[dict[str, Any]]:
        parts = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        return [{"role": "user", "content": parts}]

    yield "text only", [], ask(0, "What is the capital of France?")
    yield "small picture", [picture(200, 160)], ask(1, "What is this?")
    yield "wide picture", [picture(900, 400)], ask(1, "Describe the picture.")
    yield "two pictures", [picture(320, 480), picture(64, 48)], ask(2, "What differs?")


def _processors(folder: Path) -> tuple[Any, Any]:
    """Our processor and transformers' for ``folder``."""
    from smolvlm_fms.hf.reference import reference_processor
    from smolvlm_fms.processing import load_processor

    return load_processor(folder), reference_processor(folder)


def _compare(
    name: str,
    pictures: list[Image.Image],
    messages: list[dict[str, Any]],
    ours: Any,
    theirs: Any,
    processors: tuple[Any, Any],
    new_tokens: int,
) -> list[Check]:
    our_batch, their_batch = (_prepare(processor, pictures, messages) for processor in processors)
    checks = [_equal(f"{name}: ids", our_batch["input_ids"], their_batch["input_ids"])]
    inputs = {key: torch.as_tensor(value) for key, value in their_batch.items()}
    if pictures:
        checks.append(_close(f"{name}: pixels", our_batch["pixel_values"], inputs["pixel_values"], PIXEL_TOLERANCE))
        media = {k: inputs[k] for k in ("pixel_values", "pixel_attention_mask", "image_sizes") if k in inputs}
        reference = theirs.get_image_features(**media, return_dict=True)
        features = ours.encode_images(**media, **({} if "image_sizes" in media else {"input_ids": inputs["input_ids"]}))
        checks.append(_close(f"{name}: features", _flat(features[0]), _flat(reference), LOGIT_TOLERANCE))
    keys = ("input_ids", "pixel_values", "pixel_attention_mask", "image_sizes", "attention_mask")
    inputs = {key: inputs[key] for key in keys if key in inputs}
    reference_logits = theirs(**inputs).logits
    checks.append(_close(f"{name}: logits", ours(**inputs), reference_logits, LOGIT_TOLERANCE, argmax=True))
    checks.append(_greedy(f"{name}: greedy text", ours, theirs, inputs, new_tokens))
    return checks


def _prepare(processor: Any, pictures: list[Image.Image], messages: list[dict[str, Any]]) -> dict[str, Tensor]:
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    media = {"images": [pictures]} if pictures else {}
    return dict(processor(text=[text], return_tensors="pt", **media))


def _greedy(name: str, ours: Any, theirs: Any, inputs: dict[str, Tensor], new_tokens: int) -> Check:
    """Greedy tokens of both; ours by the adapter, whose forward is the model's own."""
    from smolvlm_fms.hf.adapter import to_hf_api

    adapted = to_hf_api(ours)
    adapted.generation_config = theirs.generation_config
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    mine, reference = (model.generate(**inputs, **options)[:, length:] for model in (adapted, theirs))
    return _equal(name, mine, reference)


def _equal(name: str, mine: Tensor, reference: Tensor) -> Check:
    """All elements equal, whatever the shapes: a different number of tokens is a difference."""
    mine, reference = torch.as_tensor(mine), torch.as_tensor(reference)
    if mine.shape != reference.shape:
        return Check(name, float("inf"), 0.0, False)
    agree = float((mine == reference).float().mean()) if mine.numel() else 1.0
    difference = float((mine - reference).abs().max()) if mine.numel() else 0.0
    return Check(name, difference, agree, agree == 1.0)


def _close(name: str, mine: Tensor, reference: Tensor, tolerance: float, argmax: bool = False) -> Check:
    mine, reference = torch.as_tensor(mine).float(), torch.as_tensor(reference).float()
    if mine.shape != reference.shape:
        return Check(name, float("inf"), 0.0, False)
    difference = (mine - reference).abs()
    near = mine.argmax(-1) == reference.argmax(-1) if argmax else difference <= tolerance
    largest, agree = float(difference.max()), float(near.float().mean())
    return Check(name, largest, agree, largest <= tolerance and agree == 1.0)


def _flat(features: Any) -> Tensor:
    """Image features (…, D) as one matrix (all tokens, D), whatever a version of transformers wraps them in."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    if isinstance(features, list | tuple):
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    if not isinstance(features, Tensor):
        raise CheckpointError(f"transformers returned image features of an unknown kind: {type(features).__name__}.")
    return features.reshape(-1, features.shape[-1])
