"""LLaVA-Next through ``smolvlm_fms.load`` and the engine: the words that transformers' generate writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import smolvlm_fms as sv
from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.config import EngineConfig
from smolvlm_fms.engine.cpu_runner import CpuRunner, FallbackRunner, pack_model, suits
from smolvlm_fms.engine.engine import Engine
from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.engine.sequence import Picture
from smolvlm_fms.errors import InputError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.processing.llava_next import LlavaNextProcessor
from tests.parity.test_llava_image_parity import peer as image_peer
from tests.parity.test_llava_image_parity import picture
from tests.parity.test_llava_processor_parity import SETTINGS, their_processor
from tests.tiny import build_tokenizer
from tests.tiny_llava import FAMILIES, IMAGE_TOKEN, build_llava, load_llava_peer, make_llava_batch

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


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the packed path: on our kernels, and as on a machine without them."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("the kernels were not built here")
    return str(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_packed_path_follows_transformers_fp32(tmp_path: Path, family: str, path: str) -> None:
    """bf16 on packed weights beside transformers in fp32: features, and the log-probabilities of the chosen tokens, as
    near as those of plain bf16 (transformers' own, for the latter)."""
    folder = build_llava(tmp_path, family)
    how: dict[str, Any] = {"dtype": torch.bfloat16, "scale_logits": False, "fused_weights": path == "torch"}
    vlm_model, exact = load_model(folder, **how), load_llava_peer(folder)
    batch = make_llava_batch(folder, [[0, 2], [], [1]], seed=4)
    pictures = [batch["pixel_values"][0], batch["pixel_values"][2]]
    with torch.inference_mode():
        wanted = load_model(folder, dtype=torch.float32).encode_tiles(pictures[1][:2])
        usual = (vlm_model.encode_tiles(pictures[1][:2].bfloat16()) - wanted).abs().max()
        assert suits(vlm_model)
        pack_model(vlm_model)
        engine = _engine(vlm_model)
        through_tower = (engine.backend.tower(pictures[1][:2]) - wanted).abs().max()  # type: ignore[attr-defined]
        through_model = (vlm_model.encode_tiles(pictures[1][:2].bfloat16()) - wanted).abs().max()
    assert through_tower < 2 * usual and through_model < 2 * usual
    rough, first, ours, theirs = load_llava_peer(folder, torch.bfloat16), 0, 0.0, 0.0
    for row, shown in enumerate([2, 0, 1]):
        kept = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][kept]
        pixels, sizes = (batch[name][first : first + shown] for name in ("pixel_values", "image_sizes"))
        first += shown
        generation = engine.submit(
            ids.tolist(), _pictures(vlm_model, ids, pixels, sizes), GenerationOptions(max_tokens=NEW, logprobs=0)
        )
        made = [one for event in generation for one in event.tokens]
        whole = torch.cat([ids, torch.tensor([one.token for one in made])])[None]
        inputs: dict[str, Any] = {"pixel_values": pixels, "image_sizes": sizes} if shown else {}
        with torch.no_grad():
            exactly, roughly = (
                model(input_ids=whole, **inputs).logits[0, -NEW - 1 : -1].float().log_softmax(-1)
                for model in (exact, rough)
            )
        assert len(made) == NEW
        for step, one in enumerate(made):
            ours = max(ours, abs(one.logprob - float(exactly[step, one.token])))
            theirs = max(theirs, abs(float(roughly[step, one.token] - exactly[step, one.token])))
    assert ours < 2 * theirs + 0.02, (ours, theirs)


def _engine(model: Any) -> Engine:
    runner = CpuRunner if kernels.available() else FallbackRunner
    config = EngineConfig(prefill_chunk=13, prefill_chunk_alone=17)
    return Engine(runner(model, 2048), decode=lambda ids: "", stop_tokens=[], context_length=512, config=config)


def _pictures(model: Any, ids: torch.Tensor, pixels: torch.Tensor, sizes: torch.Tensor) -> list[Picture]:
    places, start, found = (ids == IMAGE_TOKEN).nonzero().flatten().numpy(), 0, []
    for number, size in enumerate(sizes.tolist()):
        geometry = model.config.resolution
        tiles, end = geometry.num_tiles(size), start + geometry.num_tokens(size)
        found.append(
            Picture(pixels[number].numpy().tobytes(), tiles, places[start:end], (pixels[number, :tiles], tuple(size)))
        )
        start = end
    return found


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
    packed = sv.load(folder, dtype="bfloat16")
    assert isinstance(packed.engine.backend, CpuRunner if kernels.available() else FallbackRunner)
    assert packed.ask(PICTURES[0], "What?", **options).tokens


@pytest.mark.skipif(transformers.__version__ < "5", reason="verify compares with transformers 5, and says so")
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
