"""The two sides of ``smolvlm verify``: a checkpoint as transformers computes it, and as this package does.

Each side reads a case once: pictures are encoded, their features and the text give logits and a cache, and greedy
generation goes on from that cache. The reference also measures how far its own result moves when nothing but the
order of its arithmetic changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache

from smolvlm_fms.errors import CheckpointError, MissingDependencyError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf.adapter import to_hf_api

__all__ = ["Noise", "Ours", "Reading", "Reference"]

Inputs = Mapping[str, Tensor]
MEDIA = ("pixel_values", "pixel_attention_mask", "image_sizes")


@dataclass(frozen=True)
class Reading:
    """What one side makes of a case.

    features: image tokens (T, D), None without pictures; logits: (1, T, V); tokens: greedy, (n,); leads: by how much
    each of them was ahead of the second best (the reference's only).
    """

    features: Tensor | None
    logits: Tensor
    tokens: Tensor
    leads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Noise:
    """Largest change of the reference's features (None: not measured) and logits under its own other arithmetic."""

    features: float | None
    logits: float


class Reference:
    """A checkpoint as transformers computes it, in evaluation mode."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        if "mm_encoder_outputs" not in inspect.signature(self.model.forward).parameters:
            raise MissingDependencyError(
                "verify needs a transformers whose models take pictures that were encoded earlier (mm_encoder_outputs, "
                "from 5.20 on)."
            )
        self._exact = self if dtype == torch.float32 else Reference(folder, torch.float32)

    def read(self, inputs: Inputs, new_tokens: int) -> tuple[Reading, Noise]:
        """The result and its noise; nothing of ours is needed for either."""
        encoded = self._encode(inputs)
        output = self._forward(inputs, encoded, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        tokens, leads = greedy(self.model, inputs, layers, new_tokens)
        reading = Reading(None if encoded is None else flat(encoded), output.logits, tokens, leads)
        return reading, self._noise(inputs, encoded, reading)

    def _noise(self, inputs: Inputs, encoded: Any, reading: Reading) -> Noise:
        """In fp32: two orders of summation in the text's attention. In other types: the distance to fp32."""
        if self._exact is self:
            self.model.set_attn_implementation("eager")
            other = self._forward(inputs, encoded).logits
            self.model.set_attn_implementation("sdpa")
            return Noise(None, furthest(other, reading.logits))
        exact = self._exact._encode(inputs)
        logits = furthest(self._exact._forward(inputs, exact).logits, reading.logits)
        return Noise(None if reading.features is None else furthest(flat(exact), reading.features), logits)

    def _encode(self, inputs: Inputs) -> Any:
        if "pixel_values" not in inputs:
            return None
        return self.model.get_image_features(**media_of(inputs, self.dtype), return_dict=True)

    def _forward(self, inputs: Inputs, encoded: Any, **options: Any) -> Any:
        shown: dict[str, Any] = {} if encoded is None else {"mm_encoder_outputs": {"image": encoded}}
        if "image_sizes" in inputs:
            shown["image_sizes"] = inputs["image_sizes"]
        return self.model(**text_of(inputs), **shown, **options)


class Ours:
    """The same checkpoint as this package computes it; generation goes through ``to_hf_api``."""

    def __init__(self, folder: Path, dtype: torch.dtype, reference: Reference) -> None:
        self.dtype = dtype
        # transformers' LLaVA-Next leaves Granite's division of the logits out; the comparison is of everything else.
        is_llava = reference.model.config.model_type == "llava_next"
        changes: dict[str, Any] = {"scale_logits": False} if is_llava else {}
        self.model = load_model(folder, dtype=dtype, **changes)
        self.adapted = to_hf_api(self.model)
        self.adapted.generation_config = reference.model.generation_config

    def read(self, inputs: Inputs, new_tokens: int) -> Reading:
        """The result, from the same tensors that the reference got."""
        features: Any = None
        if "pixel_values" in inputs:
            media = media_of(inputs, self.dtype)
            ids = {} if "image_sizes" in media else {"input_ids": inputs["input_ids"]}
            features = self.model.encode_images(**media, **ids)
        logits, cache = self.model(**text_of(inputs), image_hidden_states=features, use_cache=True)
        tokens, _ = greedy(self.adapted, inputs, cache, new_tokens)
        return Reading(None if features is None else flat(features[0]), logits, tokens)


def greedy(
    model: Any, inputs: Inputs, cache: list[tuple[Tensor, Tensor]], new_tokens: int
) -> tuple[Tensor, tuple[float, ...]]:
    """``model.generate``'s greedy tokens after ``inputs``, and how far each was ahead.

    ``cache``: each layer's keys and values (1, heads, T, D). All but the last token's are given on: from that one,
    generation has to start.
    """
    past = DynamicCache()
    length = inputs["input_ids"].shape[1]
    for number, (keys, values) in enumerate(cache):
        past.update(keys[:, :, : length - 1], values[:, :, : length - 1], number)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    made = model.generate(**text_of(inputs), past_key_values=past, **options)
    best = [scores[0].float().topk(2).values for scores in made.scores]
    return made.sequences[0, length:], tuple(float(first - second) for first, second in best)


def text_of(inputs: Inputs) -> dict[str, Tensor]:
    """Ids and mask."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def media_of(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pixels in ``dtype``, and the masks or sizes that belong to them."""
    media = {name: inputs[name] for name in MEDIA if name in inputs}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in media.items()}


def flat(features: Any) -> Tensor:
    """Image features (…, D) as one matrix (all tokens, D), whatever a version of transformers wraps them in."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    if isinstance(features, list | tuple):
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    if not isinstance(features, Tensor):
        raise CheckpointError(f"transformers returned image features of an unknown kind: {type(features).__name__}.")
    return features.reshape(-1, features.shape[-1])


def furthest(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of two tensors of a shape; infinite where either holds no number."""
    difference = (one.float() - other.float()).abs_()
    return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")
