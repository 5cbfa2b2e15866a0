"""LLaVA-Next through ``smolvlm_fms.load`` and the engine: the words that transformers' generate writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import smolvlm_fms as sv
from smolvlm_fms.errors import InputError
from smolvlm_fms.processing.llava_next import LlavaNextProcessor
from tests.parity.test_llava_image_parity import peer as image_peer
from tests.parity.test_llava_image_parity import picture
from tests.parity.test_llava_processor_parity import SETTINGS, their_processor
from tests.tiny import build_tokenizer
from tests.tiny_llava import IMAGE_TOKEN, build_llava, load_llava_peer

PICTURES = [picture(60, 43), picture(31, 100), picture(30, 30)]
NEW = 6


@pytest.mark.parametrize("family", ["granite", "mistral"])
def test_answers_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = build_llava(build_tokenizer(tmp_path, padding_side="left"), family)
    image_peer(**SETTINGS).save_pretrained(folder)
    vlm, theirs = sv.load(folder, dtype="float32"), load_llava_peer(folder)
    full = family == "granite"
    processor = their_processor(
        folder,
        patch_size=7,
        vision_feature_select_strategy="full" if full else "default",
        num_additional_image_tokens=0 if full else 1,
    )
    requests = [(PICTURES[:2], "Which one is red?"), ([], "How many cats?"), (PICTURES[2:], "What is it?")]
    answers = vlm.batch(requests, max_tokens=NEW, temperature=0.0)
    for (images, question), answer in zip(requests, answers, strict=True):
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)
        made = _greedy(theirs, inputs)
        assert list(answer.tokens) == made[: len(answer.tokens)] and answer.tokens
    again = vlm.ask(PICTURES[:2], "Which one is red?", max_tokens=NEW, temperature=0.0)
    assert again.tokens == answers[0].tokens  # from remembered features this time
    with pytest.raises((InputError, ValueError), match="detail"):
        vlm.ask(PICTURES[:1], "What?", detail="low")


def _greedy(model: Any, inputs: Any) -> list[int]:
    """Greedy tokens; an ``<image>`` is never written, as in the engine."""
    made = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=[IMAGE_TOKEN])
    tokens: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def test_bf16_and_a_prompt_in_chunks(tmp_path: Path) -> None:
    """Chunks that cut through a picture give the same tokens as one piece."""
    folder = build_llava(build_tokenizer(tmp_path, padding_side="left"), "granite")
    image_peer(**SETTINGS).save_pretrained(folder)
    whole = sv.load(folder, dtype=torch.float32)
    small = sv.load(folder, dtype=torch.float32, engine=sv.EngineConfig(prefill_chunk=32, prefill_chunk_alone=32))
    options = {"max_tokens": NEW, "temperature": 0.0}
    answers = [vlm.ask(PICTURES, "What differs?", **options).tokens for vlm in (whole, small)]
    assert answers[0] == answers[1]
    assert sv.load(folder, dtype="bfloat16").ask(PICTURES[0], "What?", **options).tokens


@pytest.mark.parametrize("family", ["granite", "mistral"])
def test_verify_certifies_a_folder(tmp_path: Path, family: str) -> None:
    """Ids, pixels, features, logits and greedy text of one folder, as ``smolvlm verify`` compares them."""
    from smolvlm_fms.hf.certificate import verify

    folder = build_llava(build_tokenizer(tmp_path, padding_side="left"), family)
    image_peer(**SETTINGS).save_pretrained(folder)
    LlavaNextProcessor.from_pretrained(folder).save_pretrained(folder)  # transformers does not look into config.json
    report = verify(folder)
    assert report["ok"], [check for check in report["checks"] if not check["ok"]]
    assert len(report["checks"]) > 10
