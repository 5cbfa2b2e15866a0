"""GGUF files compared with the model that they were written from, by reading them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from smolvlm_fms.config import SmolVLMConfig
from smolvlm_fms.export.checks import Check, compare, for_checking, make_cases, own_forward
from smolvlm_fms.fms_bridge.adapters import HEAD, split
from smolvlm_fms.fms_bridge.gguf import GGUFText, GGUFVision
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.processing.factory import load_processor

__all__ = ["check_files", "model_from_files"]

SAMPLE = (
    "What's in the picture? I'VE seen 3 33 333 3333 things,  two spaces\n\n\n\tand a tab … ------======= "
    "我想 кошка \U0001f680\U0001f636\u200d\U0001f32b\ufe0f <end_of_utterance>\n"
    "<fake_token_around_image><row_1_col_2><image><|im_start|>User:<image>x"
)
"""Contractions, numbers, runs of blanks and punctuation, other scripts, special tokens: where tokenizers differ."""


def check_files(model: Any, source: Path, text: Path, vision: Path, quantize: str | None) -> list[Check]:
    """Tensors, constants, tokenizer; then the model that the files alone describe, against the source's logits."""
    again = model_from_files(model.config, text, vision)
    checks = [
        _tensors(model, again, quantize),
        _constants(model.config, again.config),
        _rope(model, GGUFText(text)),
        _tokenizer(source, text),
    ]
    cases = make_cases(source, model.config)
    forward = own_forward(again)
    if quantize is None:
        return checks + compare(for_checking(model), forward, cases, what="read again, ")
    return checks + compare(for_checking(model), forward, cases, what=f"{quantize} to the source, ", bound=None)


def model_from_files(config: SmolVLMConfig, text: Path, vision: Path) -> Any:
    """A model in fp32 of what the files say. ``config`` gives only what no GGUF file holds (the image token's id)."""
    words, tower = GGUFText(text), GGUFVision(vision)
    changes = {"rope_scaling": config.text.rope_scaling} if words.rope_factors is not None else {}
    shape = config.updated(
        text=words.config.updated(**changes),
        vision=tower.config,
        scale_factor=tower.scale_factor,
        tie_word_embeddings=words.tied,
        linear_config=None,
        fused_weights=True,
    )
    model = architecture_of(config.model_type).model_class()(shape).float()
    words.load_into(model)
    targets = split(model.state_dict(), shape)
    with torch.no_grad():
        for name, tensor in tower.tensors():
            targets[name].copy_(tensor)
    model.post_init()
    return model.eval()


def _tensors(model: Any, again: Any, quantize: str | None) -> Check:
    """Equal to the bit where types are kept; within half a quantisation step of each block elsewhere."""
    wanted, found = (split(m.state_dict(), m.config) for m in (model, again))
    largest, equal = 0.0, 0
    for name, tensor in wanted.items():
        ours, theirs = tensor.float(), found[name].float()
        if ours.shape != theirs.shape:
            return Check("tensors", float("inf"), 0.0, False, f"{name} has another shape")
        difference = (ours - theirs).abs()
        largest = max(largest, float(difference.max()))
        equal += int(_near(ours, difference, quantize if name.startswith("text_model.") else None))
    note = f"{equal} of {len(wanted)} tensors " + ("equal" if quantize is None else "within half a step")
    ok = equal == len(wanted) and (model.config.tie_word_embeddings or HEAD in found)
    return Check("tensors", largest, equal / len(wanted), ok, note)


def _near(ours: Tensor, difference: Tensor, quantize: str | None) -> bool:
    if quantize is None or ours.dim() == 1 or ours.shape[-1] % 32:
        return not bool(difference.any())
    blocks, errors = (t.reshape(len(t), -1, 32) for t in (ours, difference))
    # Scales are rounded to fp16; 4 bits reach from -8 to 7, so the far end may be a whole step off.
    step = {"int8": 1 / 127, "int4": 1 / 8}[quantize]
    room = {"int8": 0.5, "int4": 1.0}[quantize] * step + 2**-10
    return bool((errors <= room * blocks.abs().amax(-1, keepdim=True)).all())


def _constants(wanted: Any, found: Any) -> Check:
    """Every field that decides what is computed; token ids and the way weights are held do not."""
    free = {"dtype", "fused_weights", "linear_config", "pad_token_id", "model_type"}
    idle = {"bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "logits_scaling", "model_type"}
    pairs = [(n, getattr(wanted, n), getattr(found, n)) for n in wanted.as_dict() if n not in free | {"text", "vision"}]
    for part in ("text", "vision"):
        ours, theirs = getattr(wanted, part), getattr(found, part)
        pairs += [(f"{part}.{n}", getattr(ours, n), getattr(theirs, n)) for n in ours.as_dict() if n not in idle]
    pairs = [pair for pair in pairs if pair[0] != "text.attention_multiplier"]
    pairs.append(("text.attention_scale", wanted.text.attention_scale, found.text.attention_scale))
    wrong = [f"{name} {theirs!r} for {ours!r}" for name, ours, theirs in pairs if not _same(ours, theirs)]
    agree = 1 - len(wrong) / len(pairs)
    return Check("constants", None, agree, not wrong, "; ".join(wrong) or f"{len(pairs)} fields")


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= 1e-6 * abs(ours)  # GGUF keeps single precision
    return bool(ours == theirs)


def _rope(model: Any, file: GGUFText) -> Check:
    """Llama 3's frequencies, computed by FMS, against what the file divides them by."""
    text = model.config.text
    factors = file.rope_factors
    if text.rope_scaling is None:
        return Check("rotary frequencies", None, 1.0, factors is None, "not scaled")
    wanted = model.text_model.base_model.rot_emb.rope_scaling.compute_scaled_freqs(torch.device("cpu"), 1).double()
    plain = text.rope_theta ** -(torch.arange(0, text.head_dim, 2, dtype=torch.float64) / text.head_dim)
    if factors is None:
        return Check("rotary frequencies", None, 0.0, False, "the file does not scale them")
    difference = float((plain / factors.double() / wanted - 1).abs().max())
    return Check("rotary frequencies", difference, 1.0, difference < 1e-5, "relative")


def _tokenizer(source: Path, text: Path) -> Check:
    ours = load_processor(source).tokenizer.encode(SAMPLE, add_special_tokens=False)
    theirs = Tokenizer.from_str(GGUFText(text).tokenizer_json()).encode(SAMPLE, add_special_tokens=False).ids
    same = list(ours) == list(theirs)
    return Check("tokenizer", None, float(same), same, f"{len(ours)} tokens")
