"""Generation with several pictures a row, in every way that transformers has, behind its interface; both families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from smolvlm_fms.errors import InputError, TokenCountError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf import FmsForConditionalGeneration, FmsModel, FmsVisionTransformer, register, to_hf_api
from smolvlm_fms.hf.pictures import PICTURE_INPUTS
from tests.tiny_llava import IMAGE_TOKEN, build_llava, load_llava_peer, make_llava_batch
from tests.tiny_models import build_checkpoint, load_peer, make_batch

V5 = int(transformers.__version__.split(".")[0]) >= 5
FAMILIES = ["smolvlm", "docling", "granite", "mistral"]
LLAVA = ("granite", "mistral")
NEW = 7


class Pair:
    """A checkpoint loaded by both, and batches for it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.llava = family in LLAVA
        self.folder = build_llava(folder, family) if self.llava else build_checkpoint(folder, family)
        self.ours = FmsForConditionalGeneration.from_pretrained(self.folder, dtype="float32")
        self.theirs = load_llava_peer(self.folder) if self.llava else load_peer(self.folder)
        for model in (self.ours, self.theirs):
            model.generation_config.pad_token_id = 2
            model.generation_config.suppress_tokens = [IMAGE_TOKEN]  # a written <image> has tests of its own

    def batch(self, *rows: int, seed: int = 0) -> dict[str, Any]:
        """A left-padded batch; rows with so many pictures (or tiles) each."""
        if not self.llava:
            return make_batch(self.folder, list(rows), seed=seed)
        ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        pictures = [list(range(end - count, end)) for end, count in zip(ends, rows, strict=True)]
        return make_llava_batch(self.folder, pictures, seed=seed)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("generation"), request.param)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "every beam": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "several samples": {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 2},
    "guided": {"guidance_scale": 1.5},
    "min-p": {"do_sample": True, "min_p": 0.05},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_is_continued_as_transformers_does(pair: Pair, mode: str) -> None:
    """Rows with two pictures, none and one. transformers 4 gives LLaVA-Next's beams other rows' pictures, and so do
    its several samples: there each row, which it gets right alone, is the measure.
    """
    options = {"max_new_tokens": NEW, "do_sample": False, **MODES[mode]}
    copies = options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1
    if options.get("guidance_scale") and pair.llava and not V5:
        pytest.skip("transformers 4 guides with pictures that the unconditional prompt does not show")
    batch = pair.batch(2, 0, 1)
    if copies and pair.llava and not V5:
        batch = pair.batch(1, 1)
    results = []
    for model in (pair.ours, pair.theirs):
        torch.manual_seed(3)
        results.append(model.generate(**batch, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_keep_the_pictures_of_their_own_row(pair: Pair, options: dict[str, Any]) -> None:
    """Each row of a batch as if it were alone, whatever the others show."""
    rows = (2, 0, 1, 3)
    batch = pair.batch(*rows)
    together = pair.ours.generate(**batch, **options, max_new_tokens=NEW, do_sample=False)
    length, copies, start = batch["input_ids"].shape[1], options.get("num_return_sequences", 1), 0
    for row, count in enumerate(rows):
        alone = {
            n: batch[n][row : row + 1, batch["attention_mask"][row].bool()] for n in ("input_ids", "attention_mask")
        }
        pictures = slice(start, start + count) if pair.llava else slice(row, row + 1)
        alone |= {n: v[pictures] for n, v in batch.items() if n not in alone and (count or not pair.llava)}
        start += count
        if not count:
            alone = {n: alone[n] for n in ("input_ids", "attention_mask")}
        made = pair.ours.generate(**alone, **options, max_new_tokens=NEW, do_sample=False)
        found = together[row * copies : (row + 1) * copies, length:]
        assert torch.equal(found, made[:, alone["input_ids"].shape[1] :]), row


def test_pictures_are_encoded_once_for_all_beams_and_steps(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = type(pair.ours.fms).encode_images

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return encode(*arguments, **options)

    monkeypatch.setattr(type(pair.ours.fms), "encode_images", counted)
    for options in ({"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}, {}):
        calls.clear()
        pair.ours.generate(**pair.batch(1, 1), max_new_tokens=4, do_sample=False, **options)
        assert len(calls) == 1, options


def test_assisted_by_a_smaller_model(pair: Pair, tmp_path: Path) -> None:
    """Its own pictures, its own width: the tokens are those of greedy decoding."""
    batch, options = pair.batch(2), {"max_new_tokens": 10, "do_sample": False}
    text = {"hidden_size": 24, "num_hidden_layers": 1}
    if not pair.llava:
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    family = "granite" if pair.llava else "smolvlm"
    folder = (build_llava if pair.llava else build_checkpoint)(tmp_path, family, text=text)
    assistant = FmsForConditionalGeneration.from_pretrained(folder, dtype="float32")
    if pair.llava and pair.ours.fms.config.tokens_per_tile != assistant.fms.config.tokens_per_tile:
        pytest.skip("the assistant's tower makes other numbers of tokens")
    expected = pair.ours.generate(**batch, **options)
    assert torch.equal(pair.ours.generate(**batch, **options, assistant_model=assistant), expected)


def test_candidates_copied_from_the_prompt_may_hold_image_tokens(pair: Pair) -> None:
    """Prompt lookup copies what followed the same tokens earlier; before a picture, that is ``<image>``s."""
    # transformers 4 looks for an end-of-text token among the candidates, even where there is none.
    batch, options = pair.batch(2), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 463}
    ids = batch["input_ids"]
    first = int((ids[0] == IMAGE_TOKEN).nonzero()[0])
    ids[0, -1] = ids[0, first - 1]  # the prompt ends with the token that stands before the first picture
    expected = pair.ours.generate(**batch, **options)
    found = pair.ours.generate(**batch, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(found[:, : expected.shape[1]], expected)  # transformers 4 writes a token too many


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2, "eos_token_id": 463}], ids=str
)
def test_a_written_image_token_is_no_placeholder(pair: Pair, options: dict[str, Any]) -> None:
    def only_images(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([IMAGE_TOKEN]), 0.0)

    out = pair.ours.generate(
        **pair.batch(1),
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[only_images],
        suppress_tokens=None,
        **options,
    )
    assert out[0, -4:].tolist() == [IMAGE_TOKEN] * 4


def test_a_prompt_in_pieces(pair: Pair) -> None:
    """``prefill_chunk_size`` cuts through pictures. transformers 4 then counts padding among the positions."""
    batch = pair.batch(2, 0, 1) if V5 else pair.batch(2)
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = pair.ours.generate(**batch, **options)
    assert torch.equal(pair.ours.generate(**batch, **options, prefill_chunk_size=7), expected)


def test_a_second_turn_with_a_new_picture_goes_on_from_the_cache(pair: Pair) -> None:
    """The whole conversation and all its pictures come again; what the cache holds is not read again."""
    whole = pair.batch(2)
    ids = whole["input_ids"]
    second = int((ids[0] == IMAGE_TOKEN).nonzero()[-1]) - (
        int(pair.ours.fms.config.tokens_per_tile) - 1
        if not pair.llava
        else pair.ours.fms.config.resolution.num_tokens(tuple(whole["image_sizes"][1].tolist())) - 1
    )
    first_turn = {"input_ids": ids[:, :second], "attention_mask": torch.ones(1, second, dtype=torch.long)}
    kept = slice(0, 1)
    for name in set(whole) - set(first_turn):
        first_turn[name] = whole[name][kept] if pair.llava else whole[name][:, kept]
    if not pair.llava:  # the last tile of make_batch is covered in part; here the first one is whole
        assert bool(first_turn["pixel_attention_mask"].all())
    expected = pair.ours.generate(**whole, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        cache = pair.ours(**first_turn, use_cache=True).past_key_values
    assert cache.get_seq_length() == second
    found = pair.ours.generate(**whole, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, expected)


def test_picture_features_come_as_transformers_gives_them(pair: Pair) -> None:
    batch = pair.batch(2, 1)
    names = ("pixel_values", "image_sizes") if pair.llava else ("pixel_values", "pixel_attention_mask")
    with torch.no_grad():
        mine, reference = (m.get_image_features(*(batch[n] for n in names)) for m in (pair.ours, pair.theirs))
        named = pair.ours.get_image_features(**{n: batch[n] for n in names})
    assert type(mine) is type(reference) or V5
    parts = [getattr(features, "pooler_output", features) for features in (mine, reference, named)]
    assert len(parts[0]) == len(parts[1])
    for part, expected, again in zip(*parts, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-4)
        assert torch.equal(part, again)
    if V5 and not pair.llava:
        real = batch["pixel_attention_mask"].flatten(0, 1)[:, ::8, ::8].flatten(1).bool()
        real = real[real.any(1)]
        torch.testing.assert_close(mine.last_hidden_state[real], reference.last_hidden_state[real], rtol=0, atol=1e-4)
        assert isinstance(pair.ours.get_image_features(batch[names[0]], batch[names[1]], return_dict=False), tuple)


def test_outputs_have_transformers_classes_and_fields(pair: Pair) -> None:
    batch = pair.batch(2, 1)
    with torch.no_grad():
        mine, reference = (m(**batch) for m in (pair.ours, pair.theirs))
        headless = pair.ours.model(**batch), pair.theirs.model(**batch)
    for found, expected in ((mine, reference), headless):
        assert type(found) is type(expected)
        assert set(found.keys()) == set(expected.keys())
        features = expected.image_hidden_states
        if hasattr(features, "pooler_output"):  # so in 5.23's SmolVLM without head; elsewhere a tensor
            features = torch.cat(features.pooler_output)
        torch.testing.assert_close(found.image_hidden_states, features, rtol=0, atol=1e-4)


def test_features_encoded_earlier_are_taken_in_every_form(pair: Pair) -> None:
    batch = pair.batch(2, 1)
    text = {n: batch[n] for n in ("input_ids", "attention_mask")}
    media = {n: v for n, v in batch.items() if n not in text}
    with torch.no_grad():
        expected = pair.ours(**batch)
        features = pair.ours.get_image_features(**media)
        forms = [{"image_hidden_states": expected.image_hidden_states}]
        forms.append({"image_hidden_states": getattr(features, "pooler_output", features)})
        forms += [{"mm_encoder_outputs": {"image": features}}] if V5 else []
        for form in forms:
            assert torch.equal(pair.ours(**text, **form).logits, expected.logits)
            for options in ({}, {"num_beams": 2}):
                found = pair.ours.generate(**text, **form, max_new_tokens=4, do_sample=False, **options)
                assert torch.equal(found, pair.ours.generate(**batch, max_new_tokens=4, do_sample=False, **options))


def test_a_prompt_of_embeddings(pair: Pair) -> None:
    """``generate(inputs_embeds=…)``, pictures packed in by the caller, returns the new tokens alone."""
    batch = pair.batch(2, 0, 1)
    with torch.no_grad():
        packed, _ = pair.ours._encode(batch["input_ids"], None, {**dict.fromkeys(PICTURE_INPUTS), **media(batch)})
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = pair.ours.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    found = pair.ours.generate(inputs_embeds=packed, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(found, expected)


def media(batch: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in batch.items() if n not in ("input_ids", "attention_mask")}


def test_embeddings_can_be_resized_and_saved(pair: Pair, tmp_path: Path) -> None:
    model = FmsForConditionalGeneration.from_pretrained(pair.folder, dtype="float32")
    batch = pair.batch(1)
    before = model(**batch).logits
    model.resize_token_embeddings(480, mean_resizing=False)
    after = model(**batch).logits
    assert after.shape[-1] == 480
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    tied = model.fms.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.get_text_config().vocab_size == model.fms.config.text.vocab_size == 480
    model.save_pretrained(tmp_path)
    again = (load_llava_peer if pair.llava else load_peer)(tmp_path)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(again(**batch).logits[real], after[real], rtol=0, atol=1e-4)


def switch(model: Any, what: str, *arguments: Any) -> None:
    """transformers' own method, which 5.23 renamed."""
    name = f"activation_checkpointing_{what}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{what}")(*arguments)


def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient(pair: Pair) -> None:
    """transformers' own switch; how often each layer runs shows that it is on."""
    batch = pair.batch(1, 2)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients, runs = [], []
    for on in (False, True):
        model = FmsForConditionalGeneration.from_pretrained(pair.folder, dtype="float32").train()
        assert model.supports_gradient_checkpointing
        if on:
            switch(model, "enable", {"use_reentrant": False})
        count: list[int] = []
        layers = (model.text.base_model.layers[0], model.fms.vision_tower.layers[0])
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model(**batch, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        runs.append(len(count))
        if on:
            switch(model, "disable")
            count.clear()
            model(**batch, labels=labels).loss.backward()
            assert len(count) == runs[0]
    assert runs == [2, 4]
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu"), None], ids=str)
def test_device_maps(pair: Pair, device_map: Any) -> None:
    model = FmsForConditionalGeneration.from_pretrained(pair.folder, dtype=torch.bfloat16, device_map=device_map)
    assert model.device.type == ("cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu")
    assert model.dtype == torch.bfloat16


def test_streamers_hear_every_token(pair: Pair) -> None:
    heard: list[int] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            heard.extend(value.flatten().tolist())

        def end(self) -> None:
            heard.append(-1)

    made = pair.ours.generate(**pair.batch(2), max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert heard == [*made[0].tolist(), -1]


def test_what_generation_returns_besides_tokens(pair: Pair) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    batch = pair.batch(2, 1)
    results = [m.generate(**batch, **options, output_hidden_states=True) for m in (pair.ours, pair.theirs)]
    assert type(results[0]) is type(results[1])
    for mine, reference in zip(results[0].scores, results[1].scores, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)
    assert [len(step) for step in results[0].hidden_states] == [len(step) for step in results[1].hidden_states]


def test_bad_arguments_are_named(pair: Pair, tmp_path: Path) -> None:
    batch = pair.batch(1)
    text = {n: batch[n] for n in ("input_ids", "attention_mask")}
    foreign = {"pixel_attention_mask": torch.ones(1)} if pair.llava else {"image_sizes": torch.ones(1, 2)}
    fms = pair.ours.fms
    with torch.no_grad():
        output = pair.ours(**batch)
    cases: list[tuple[str, Any]] = [
        ("image_sizes", lambda: pair.ours(**batch, **foreign)),
        ("not both", lambda: pair.ours(**batch, image_hidden_states=output.image_hidden_states)),
        (
            "not both",
            lambda: pair.ours(**text, image_hidden_states=[torch.ones(1, 2)], mm_encoder_outputs={"image": 1}),
        ),
        ("'image'", lambda: pair.ours(**text, mm_encoder_outputs={"audio": torch.ones(1, 2)})),
        (
            "input_ids",
            lambda: pair.ours.generate(inputs_embeds=torch.ones(1, 3, 48), pixel_values=batch["pixel_values"]),
        ),
        ("SmolVLM or a LlavaNext; Linear", lambda: to_hf_api(torch.nn.Linear(1, 1))),
        ("transformers model already", lambda: to_hf_api(pair.ours)),
        (r"Pass its \.model", lambda: to_hf_api(type("VLM", (), {"model": fms})())),
        ("FmsForConditionalGeneration, FmsModel", lambda: to_hf_api(fms, torch.nn.Linear)),
        ("cannot be given nonsense", lambda: to_hf_api(fms, nonsense=3)),
        (
            "another model than this one: tie_word",
            lambda: to_hf_api(fms, tie_word_embeddings=not fms.config.tie_word_embeddings),
        ),
        ("model_type", lambda: to_hf_api(fms, model_type="llama")),
        ("vision_only", lambda: to_hf_api(load_model(pair.folder, vision_only=True))),
        ("vision_only", lambda: to_hf_api(load_model(pair.folder, vision_only=True), FmsModel)),
        ("does not take", lambda: FmsModel.from_pretrained(pair.folder, quantization_config={})),
        ("does not know", lambda: register(("smolvlm", "llama"))),
    ]
    for words, call in cases:
        with pytest.raises(InputError, match=words):
            call()
    if pair.llava:
        with pytest.raises(InputError, match="image_sizes is missing"):
            pair.ours(**text, pixel_values=batch["pixel_values"])
    with pytest.raises(TokenCountError):
        pair.ours.generate(
            **{**batch, "input_ids": batch["input_ids"][:, :-5], "attention_mask": None}, max_new_tokens=2
        )


def test_the_tower_of_a_model_loaded_for_its_pictures(pair: Pair) -> None:
    part = load_model(pair.folder, vision_only=True)
    tower = to_hf_api(part, FmsVisionTransformer)
    side = part.config.vision.image_size
    pixels = torch.rand(2, 3, side, side)
    with torch.no_grad():
        found = tower(pixel_values=pixels, output_hidden_states=True)
        whole = pair.theirs.model.vision_tower if pair.llava else pair.theirs.model.vision_model
        expected = whole(pixels, output_hidden_states=True)
    # CLIP norms its class token alone, and so ours its own way (ClipTower); the states below are the same.
    for state, reference in zip(found.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(state, reference, rtol=0, atol=1e-4)
