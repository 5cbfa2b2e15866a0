"""Encoded pictures between transformers' generation and our models: made, resumed, in transformers' form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import __version__ as _TRANSFORMERS
from transformers.modeling_outputs import BaseModelOutputWithPooling

from smolvlm_fms.errors import InputError
from smolvlm_fms.model.llava_next import LlavaNext, PictureFeatures
from smolvlm_fms.model.smolvlm import ImageFeatures

__all__ = ["IS_V5", "PICTURE_INPUTS", "encode", "flat", "given_features", "pooled", "resume"]

IS_V5 = int(_TRANSFORMERS.split(".")[0]) >= 5

PICTURE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_hidden_states", "mm_encoder_outputs")
"""Arguments of ``forward`` that carry pictures. The last two are features that were encoded earlier."""

Encoded = ImageFeatures | PictureFeatures


def encode(
    model: Any,
    pixel_values: Any,
    pixel_attention_mask: Tensor | None = None,
    image_sizes: Any = None,
    input_ids: Tensor | None = None,
) -> Encoded:
    """Encode with SmolVLM (which takes ``pixel_attention_mask``) or LlavaNext (which takes ``image_sizes``).

    Raises InputError for the other family's argument.
    """
    features: Encoded
    if isinstance(model, LlavaNext):
        if image_sizes is None or pixel_attention_mask is not None:
            raise InputError(
                "LLaVA-Next's pixel_values come with image_sizes, (pictures, 2): each one's height and width, and "
                f"without pixel_attention_mask; image_sizes is {_what(image_sizes)}, "
                f"pixel_attention_mask {_what(pixel_attention_mask)}."
            )
        features = model.encode_images(pixel_values, image_sizes)
    elif image_sizes is not None:
        raise InputError(
            f"{type(model).__name__} reads the sizes of its pictures from pixel_attention_mask; image_sizes came."
        )
    else:
        features = model.encode_images(pixel_values, pixel_attention_mask, input_ids)
    return features


def given_features(image_hidden_states: Any, mm_encoder_outputs: Any) -> Any:
    """Features that the caller encoded earlier, in any of the forms that have been in use: our own named tuples (as
    they are), one tensor, a list of tensors, transformers 5's ``{"image": output}``. None without any.
    """
    if image_hidden_states is not None and mm_encoder_outputs:
        raise InputError("Give image_hidden_states or mm_encoder_outputs, not both.")
    value = image_hidden_states
    if isinstance(mm_encoder_outputs, dict):
        unknown = sorted(set(mm_encoder_outputs) - {"image"})
        if unknown:
            raise InputError(f"mm_encoder_outputs holds {unknown}; these models have pictures alone ('image').")
        value = mm_encoder_outputs.get("image")
    elif mm_encoder_outputs is not None:
        value = mm_encoder_outputs
    value = getattr(value, "pooler_output", value)
    if isinstance(value, list | tuple) and not isinstance(value, Encoded):
        value = torch.cat([part.reshape(-1, part.shape[-1]) for part in value]) if value else None
    return value[None] if isinstance(value, Tensor) and value.dim() == 2 else value


def resume(prompt_ids: Tensor, prompt_BTD: Tensor, seen: int, ids: Tensor, cached: int, embed: Any) -> Tensor | None:
    """Embeddings of ``ids`` (B, t), the last of ``seen`` tokens, where some of them belong to the prompt; else None.

    ``prompt_BTD`` are the embeddings of ``prompt_ids``, pictures among them; ``embed`` embeds what was written since.
    Where a prompt comes in pieces, ``seen`` counts a piece alone, and the cache's length says where it lies.
    """
    total, length = prompt_ids.shape[1], ids.shape[1]
    start: int | None = seen - length
    if seen < total:
        places = (cached, 0)
        start = next((s for s in places if torch.equal(prompt_ids[:, s : s + length], ids)), None)
    if start is None:
        raise InputError(
            f"A piece of {length} tokens, put behind {cached} cached ones, is no part of the prompt of {total} tokens. "
            "With prefill_chunk_size and a cache of your own, give the whole text from the first cached token on."
        )
    if start >= total:
        return None
    prompt_part = prompt_BTD[:, start : start + length]
    return torch.cat((prompt_part, embed(ids[:, prompt_part.shape[1] :])), 1)


def flat(features: Any) -> Tensor:
    """What transformers' outputs carry as ``image_hidden_states``: 5 joins all tokens (T, D), 4 only LLaVA-Next's."""
    if isinstance(features, PictureFeatures):
        return torch.cat(features.features)
    tensor: Tensor = features.features if isinstance(features, ImageFeatures) else features
    return tensor.reshape(-1, tensor.shape[-1]) if IS_V5 else tensor


def pooled(features: Encoded, tower_states: list[Tensor]) -> Any:
    """What transformers' ``get_image_features`` gives: from 5 on an output whose ``pooler_output`` lists the tokens of
    each row (SmolVLM) or picture (LLaVA-Next), each (T, D); in 4 the tiles (M, tokens, D), or that list.
    """
    if isinstance(features, PictureFeatures):
        parts = list(features.features)
    else:
        parts = [row.flatten(0, 1) for row in torch.split(features.features, features.tiles_per_row)]
    if IS_V5:
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat(tower_states) if tower_states else None, pooler_output=parts
        )
    return parts if isinstance(features, PictureFeatures) else features.features


def _what(value: Any) -> str:
    return "missing" if value is None else f"given ({type(value).__name__})"
