"""``to_hf_api``: forward and generate equal transformers' own models, in every mode of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smolvlm_fms.errors import InputError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf import FmsForConditionalGeneration, FmsModel, FmsVisionTransformer, to_hf_api
from tests.tiny_models import build_checkpoint, load_peer, make_batch

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "penalty": {"repetition_penalty": 1.4},
    "no repeats": {"no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module", params=["smolvlm", "tied", "granite"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = build_checkpoint(tmp_path_factory.mktemp(f"hf-{request.param}-"), request.param)
    theirs, ours = load_peer(folder), to_hf_api(load_model(folder))
    for model in (theirs, ours):
        model.generation_config.pad_token_id = 2
        model.generation_config.eos_token_id = 463
    return folder, ours, theirs


def test_forward_gives_the_same_output(pair: tuple[Path, Any, Any]) -> None:
    folder, ours, theirs = pair
    batch = make_batch(folder, [1, 0, 2])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        mine, reference = (m(**batch, labels=labels, output_hidden_states=True) for m in (ours, theirs))
    real = batch["attention_mask"].bool()
    assert torch.allclose(mine.logits[real], reference.logits[real], atol=1e-4)
    assert abs(float(mine.loss - reference.loss)) < 1e-5
    assert len(mine.hidden_states) == len(reference.hidden_states)
    for state, expected in zip(mine.hidden_states, reference.hidden_states, strict=True):
        assert torch.allclose(state[real], expected[real], atol=1e-4)
    assert mine.past_key_values.get_seq_length() == batch["input_ids"].shape[1]


def test_attentions_are_those_that_transformers_computes(pair: tuple[Path, Any, Any]) -> None:
    folder, ours, theirs = pair
    batch = make_batch(folder, [1, 1])
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        mine, reference = (m(**batch, output_attentions=True).attentions for m in (ours, theirs))
    theirs.set_attn_implementation("sdpa")
    real = batch["attention_mask"].bool()
    assert len(mine) == len(reference) > 0
    for weights, expected in zip(mine, reference, strict=True):
        assert torch.allclose(weights.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_same_tokens(pair: tuple[Path, Any, Any], mode: str) -> None:
    folder, ours, theirs = pair
    batch = make_batch(folder, [1, 0, 2])
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        results.append(model.generate(**batch, max_new_tokens=7, **{"do_sample": False, **MODES[mode]}))
    assert torch.equal(*results)


def test_assisted_decoding_gives_the_same_tokens(pair: tuple[Path, Any, Any]) -> None:
    folder, ours, theirs = pair
    batch = make_batch(folder, [1])
    options = {"max_new_tokens": 10, "do_sample": False, "prompt_lookup_num_tokens": 3}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


def test_streamers_and_logits_processors_are_heard(pair: tuple[Path, Any, Any]) -> None:
    from transformers.generation.streamers import BaseStreamer

    folder, ours, _ = pair
    batch = make_batch(folder, [1])

    class Collect(BaseStreamer):  # type: ignore[misc]
        seen: list[int] = []  # noqa: RUF012

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    def only_seven(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    out = ours.generate(**batch, max_new_tokens=3, do_sample=False, streamer=Collect(), logits_processor=[only_seven])
    assert out[0, -3:].tolist() == [7, 7, 7]
    assert Collect.seen[-4:] == [7, 7, 7, -1]


def test_save_and_load_go_through_transformers_names(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, ours, _ = pair
    ours.save_pretrained(tmp_path)
    batch = make_batch(folder, [1, 2])
    with torch.no_grad():
        expected = ours(**batch).logits
        again = FmsForConditionalGeneration.from_pretrained(tmp_path, dtype="float32", device_map="auto")
        assert torch.equal(again(**batch).logits, expected)
        real = batch["attention_mask"].bool()
        assert torch.allclose(load_peer(tmp_path)(**batch).logits[real], expected[real], atol=1e-4)


def test_the_tower_and_the_headless_model_stand_alone(pair: tuple[Path, Any, Any]) -> None:
    folder, _, theirs = pair
    batch = make_batch(folder, [1, 2])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        model = FmsModel.from_pretrained(folder, dtype="float32")
        mine, reference = (m(**batch).last_hidden_state for m in (model, theirs.model))
        assert torch.allclose(mine[real], reference[real], atol=1e-4)
        tower = FmsVisionTransformer.from_pretrained(folder, dtype="float32")
        tiles = batch["pixel_values"][1]
        mask = torch.ones(2, tiles.shape[2] // 8, tiles.shape[3] // 8, dtype=torch.bool)
        mask[1, :, 2:] = False
        mine, reference = (
            m(pixel_values=tiles, patch_attention_mask=mask).last_hidden_state
            for m in (tower, theirs.model.vision_model)
        )
    assert torch.allclose(mine[mask.flatten(1)], reference[mask.flatten(1)], atol=1e-4)


def test_embeddings_can_be_resized(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "smolvlm")
    model = to_hf_api(load_model(folder))
    model.resize_token_embeddings(480, mean_resizing=False)
    batch = make_batch(folder, [1])
    assert model(**batch).logits.shape[-1] == 480
    assert model.config.get_text_config().vocab_size == model.fms.config.text.vocab_size == 480


def test_gradients_are_the_same_with_checkpointing(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "smolvlm")
    batch = make_batch(folder, [1, 2])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        model = to_hf_api(load_model(folder)).train()
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = checkpointing
        model(**batch, labels=labels).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True) if a is not None)


def test_what_cannot_be_meant_is_refused(pair: tuple[Path, Any, Any]) -> None:
    folder, ours, _ = pair
    batch = make_batch(folder, [1])
    with pytest.raises(InputError, match="exactly one"):
        ours(attention_mask=batch["attention_mask"])
    embeddings = ours.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(InputError, match="input_ids"):
        ours(inputs_embeds=embeddings, pixel_values=batch["pixel_values"])
    with pytest.raises(InputError, match="packed=False"):
        packed = load_model(folder)
        packed.text_model.base_model.embedding = torch.nn.Identity()
        to_hf_api(packed)
    with pytest.raises(InputError, match="one device"):
        FmsForConditionalGeneration.from_pretrained(folder, device_map={"a": "cpu", "b": "cuda:0"})
