"""The engine beside transformers' generate: the same tokens in fp32, whatever shares batch, cache or chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import smolvlm_fms as sv
from smolvlm_fms.engine.config import EngineConfig
from smolvlm_fms.engine.engine import Engine, Generation
from smolvlm_fms.engine.kv_cache import MIN_REUSE
from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.engine.runner import ModelRunner
from smolvlm_fms.engine.sampler import filtered_probabilities
from smolvlm_fms.engine.sequence import Picture
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf.reference import reference_processor
from tests.tiny_models import FAMILIES, IMAGE_TOKEN, build_checkpoint, load_peer, make_batch

TILES = [2, 0, 1, 3]
LENGTH = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: build_checkpoint(root / family, family, seed=3) for family in FAMILIES}


def engine_for(folder: Path, **config: Any) -> Engine:
    model = load_model(folder, dtype=torch.float32)
    return Engine(
        ModelRunner(model, kv_tokens=2048),
        decode=lambda ids: "".join(chr(97 + token % 26) for token in ids),
        stop_tokens=[],
        context_length=model.config.text.max_position_embeddings,
        config=EngineConfig(**config),
    )


def submit_row(engine: Engine, batch: dict[str, torch.Tensor], row: int, **options: Any) -> Generation:
    """One row of a padded batch as a request of its own."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    mask = batch["pixel_attention_mask"][row]
    count = int(mask.flatten(1).any(1).sum())
    places = np.flatnonzero(np.asarray(ids) == IMAGE_TOKEN)
    per_tile = len(places) // max(count, 1)
    pictures = [
        Picture(
            key=bytes([row, tile]),
            tiles=1,
            positions=places[tile * per_tile : (tile + 1) * per_tile],
            pixels=(batch["pixel_values"][row][tile : tile + 1], mask[tile : tile + 1]),
        )
        for tile in range(count)
    ]
    return engine.submit(ids, pictures, GenerationOptions(max_tokens=LENGTH, loop_detection=False, **options))


def tokens_of(generation: Generation) -> list[int]:
    return [sampled.token for event in generation for sampled in event.tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    batch = make_batch(folder, TILES, seed=1)
    peer = load_peer(folder)
    with torch.no_grad():
        out = peer.generate(**batch, do_sample=False, max_new_tokens=LENGTH)
    expected = out[:, batch["input_ids"].shape[1] :].tolist()
    engine = engine_for(folder, prefill_chunk=13, prefill_chunk_alone=13)
    together = [submit_row(engine, batch, row) for row in range(len(TILES))]
    assert [tokens_of(generation) for generation in together] == expected
    alone = engine_for(folder)
    assert [tokens_of(submit_row(alone, batch, row)) for row in range(len(TILES))] == expected
    again = [submit_row(alone, batch, row) for row in range(len(TILES))]
    assert [tokens_of(generation) for generation in again] == expected
    reused = [g.sequence.reused for g in again]
    assert reused == [len(g.sequence.prompt) - 1 if len(g.sequence.prompt) > MIN_REUSE else 0 for g in again]


def test_penalties_are_those_of_transformers(folders: dict[str, Path]) -> None:
    folder = folders["smolvlm"]
    batch = make_batch(folder, [1, 2], seed=2)
    with torch.no_grad():
        out = load_peer(folder).generate(**batch, do_sample=False, max_new_tokens=LENGTH, repetition_penalty=1.3)
    engine = engine_for(folder)
    # transformers counts the padding in front of the shorter row as seen, too: the longest row has none.
    row = int(batch["attention_mask"].sum(1).argmax())
    expected = out[row, batch["input_ids"].shape[1] :].tolist()
    assert tokens_of(submit_row(engine, batch, row, repetition_penalty=1.3)) == expected


def test_logprobs_are_those_of_transformers(folders: dict[str, Path]) -> None:
    folder = folders["idefics3"]
    batch = make_batch(folder, [2], seed=4)
    with torch.no_grad():
        out = load_peer(folder).generate(
            **batch, do_sample=False, max_new_tokens=LENGTH, output_logits=True, return_dict_in_generate=True
        )
    expected = torch.stack(out.logits).log_softmax(-1)[:, 0]
    generation = submit_row(engine_for(folder), batch, 0, logprobs=3)
    sampled = [one for event in generation for one in event.tokens]
    for step, one in enumerate(sampled):
        values, ids = expected[step].topk(3)
        assert one.logprob == pytest.approx(float(values[0]), abs=1e-4)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("values", [{"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.7}])
def test_filters_keep_what_those_of_transformers_keep(values: dict[str, Any]) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(5)) * 3
    options = GenerationOptions(temperature=0.8, **values)
    warped = TemperatureLogitsWarper(0.8)(torch.zeros(1, 1, dtype=torch.long), logits)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in values:
            warped = warper(values[name])(torch.zeros(1, 1, dtype=torch.long), warped)
    expected = warped.softmax(-1)[0]
    probabilities, ids = filtered_probabilities(logits[0], options)
    assert sorted(ids.tolist()) == expected.nonzero().flatten().tolist()
    assert torch.allclose(probabilities, expected[ids], atol=1e-6)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_the_whole_way_from_pictures_to_text_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, family, seed=6, processor=True)
    pictures = [
        Image.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8))
        for seed, size in enumerate([(50, 90), (128, 40), (20, 20)])
    ]
    rows = [([0, 1], "Compare them."), ([], "Hello there"), ([2], "How many cats are there?")]
    messages = [
        [{"role": "user", "content": [*({"type": "image"} for _ in own), {"type": "text", "text": question}]}]
        for own, question in rows
    ]
    processor, peer = reference_processor(folder), load_peer(folder)
    processor.tokenizer.padding_side = "left"
    batch = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in messages],
        images=[[pictures[index] for index in own] for own, _ in rows],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.no_grad():
        out = peer.generate(**batch, do_sample=False, max_new_tokens=LENGTH)
    expected = out[:, batch["input_ids"].shape[1] :]
    vlm = sv.load(folder, dtype=torch.float32)
    requests = [([pictures[index] for index in own], question) for own, question in rows]
    answers = vlm.batch(requests, max_tokens=LENGTH, ignore_eos=True, loop_detection=False)
    assert [list(answer.tokens) for answer in answers] == expected.tolist()
    assert [answer.text for answer in answers] == processor.batch_decode(expected, skip_special_tokens=True)
    prompts = batch["attention_mask"].sum(1).tolist()
    assert [answer.usage.prompt_tokens for answer in answers] == prompts
