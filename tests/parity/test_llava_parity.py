"""Our LLaVA-Next against transformers' and FMS's own, on tiny random checkpoints, through files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from smolvlm_fms.errors import CheckpointError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from tests.tiny_llava import FAMILIES, IMAGE_TOKEN, build_llava, load_llava_peer, make_llava_batch

FP32_LIMIT = 1e-4
ROWS = [[[0]], [[0, 1], [], [2]], [[], []], [[3, 3, 5], [4, 0, 1, 2]], [[4]]]


class Pair(NamedTuple):
    """One checkpoint loaded by both; ours without Granite's division of the logits, which transformers leaves out."""

    folder: Path
    ours: Any
    theirs: Any


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = build_llava(tmp_path_factory.mktemp(f"llava-{request.param}-"), request.param)
    with torch.no_grad():
        yield Pair(folder, load_model(folder, scale_logits=False), load_llava_peer(folder))


def gap(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> float:
    """Largest absolute difference, at real tokens."""
    difference = (ours.float() - theirs.float()).abs()
    return float(difference.max() if mask is None else difference[mask.bool()].max())


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_logits(pair: Pair, rows: list[list[int]]) -> None:
    batch = make_llava_batch(pair.folder, rows)
    theirs = pair.theirs(**batch).logits
    assert theirs.std() > 0.5  # a comparison of zeros would prove nothing
    assert gap(pair.ours(**batch), theirs, batch["attention_mask"]) <= FP32_LIMIT


def test_pictures_matter(pair: Pair) -> None:
    batch = make_llava_batch(pair.folder, [[0]])
    blank = {**batch, "pixel_values": batch["pixel_values"] * 0}
    assert gap(pair.ours(**batch)[:, -1], pair.ours(**blank)[:, -1]) > 0.05


def test_image_features(pair: Pair) -> None:
    batch = make_llava_batch(pair.folder, [[3, 1, 4, 5]])
    pixels, sizes = batch["pixel_values"], batch["image_sizes"]
    theirs = pair.theirs.get_image_features(pixels, sizes)
    theirs = getattr(theirs, "pooler_output", theirs)  # transformers 4 gives the list alone
    ours = pair.ours.encode_images(pixels, sizes).features
    assert [len(t) for t in theirs] == [len(o) for o in ours]
    assert max(gap(o, t) for o, t in zip(ours, theirs, strict=True)) <= FP32_LIMIT


def test_bf16_is_as_near_to_fp32_as_transformers_is(pair: Pair) -> None:
    batch = make_llava_batch(pair.folder, [[0, 1], [], [2]])
    mask, exact = batch["attention_mask"], pair.theirs(**batch).logits
    theirs = gap(load_llava_peer(pair.folder, torch.bfloat16)(**batch).logits, exact, mask)
    ours_model = load_model(pair.folder, dtype=torch.bfloat16, scale_logits=False)
    ours = ours_model(**batch)
    assert ours.dtype == torch.bfloat16
    assert gap(ours, exact, mask) <= 1.5 * theirs


def test_loss(pair: Pair) -> None:
    batch = make_llava_batch(pair.folder, [[0, 1], [], [2]])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    # What padding predicts is nobody's business, so a row's first token is no target.
    labels = ids.masked_fill((mask.cumsum(1) <= 1) | (ids == IMAGE_TOKEN), -100)
    theirs = pair.theirs(**batch, labels=labels).loss
    logits = pair.ours(**batch)
    ours = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert float((ours - theirs).abs()) <= 1e-5
    kept = pair.ours(**batch, logits_mask=labels != -100)
    assert torch.equal(kept, logits[labels != -100])


def test_greedy_tokens(pair: Pair) -> None:
    """transformers' generate, FMS's generate with our hook, and forward alone all write the same tokens."""
    from fms.utils.generation import generate

    for seed in range(20):  # until no row happens to write an <image>, which forward alone cannot tell from a prompt's
        batch = make_llava_batch(pair.folder, [[0, 1], [], [2]], seed=seed)
        theirs = pair.theirs.generate(**batch, max_new_tokens=8, do_sample=False)
        if not bool((theirs[:, batch["input_ids"].shape[1] :] == IMAGE_TOKEN).any()):
            break
    alone = batch["input_ids"]
    for _ in range(8):
        mask = F.pad(batch["attention_mask"], (0, alone.shape[1] - batch["input_ids"].shape[1]), value=1)
        logits = pair.ours(**{**batch, "input_ids": alone, "attention_mask": mask})
        alone = torch.cat((alone, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(alone, theirs)
    for use_cache in (True, False):
        extra = {name: value for name, value in batch.items() if name != "input_ids"}
        made = generate(
            pair.ours,
            batch["input_ids"],
            max_seq_len=512,
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            extra_kwargs=extra,
            prepare_model_inputs_hook=pair.ours.prepare_inputs,
        )
        assert torch.equal(made, theirs)


@pytest.mark.parametrize("fused", [True, False])
def test_saved_folder_is_the_same_checkpoint(pair: Pair, tmp_path: Path, fused: bool) -> None:
    batch = make_llava_batch(pair.folder, [[0], [1, 2]])
    model = load_model(pair.folder, fused_weights=fused, scale_logits=False)
    save_pretrained(model, tmp_path / "hf")
    again = load_llava_peer(tmp_path / "hf")
    assert torch.equal(again(**batch).logits, pair.theirs(**batch).logits)
    before, after = dict(pair.theirs.state_dict()), dict(again.state_dict())
    # SigLIP's pooling head is the one part that LLaVA-Next does not use and that is not kept.
    assert all(".head." in name for name in set(before) - set(after))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    save_pretrained(model, tmp_path / "fms", source="fms")
    own = load_model(tmp_path / "fms", fused_weights=fused, scale_logits=False)
    assert torch.equal(own(**batch), model(**batch))


def test_behind_transformers_interface(pair: Pair, tmp_path: Path) -> None:
    """``to_hf_api``: logits, loss, beams and a saved folder are transformers' own."""
    from smolvlm_fms.hf import to_hf_api

    adapted = to_hf_api(pair.ours)
    batch = make_llava_batch(pair.folder, [[0, 1], [], [2]])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill((mask.cumsum(1) <= 1) | (ids == IMAGE_TOKEN), -100)
    ours, theirs = (model(**batch, labels=labels) for model in (adapted, pair.theirs))
    assert gap(ours.logits, theirs.logits, mask) <= FP32_LIMIT
    assert float((ours.loss - theirs.loss).abs()) <= 1e-5
    one_each = make_llava_batch(pair.folder, [[0], [2]])
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(adapted.generate(**one_each, **options), pair.theirs.generate(**one_each, **options))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(load_llava_peer(tmp_path)(**batch).logits, theirs.logits)


def hub_layout(name: str) -> str:
    """Names of the hub's own checkpoints, and of everything before transformers 5.20."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def memory_layout(name: str) -> str:
    """Names as modules have them in transformers 4.52 to 5.19."""
    name = re.sub(r"^language_model\.model\.", "model.language_model.", hub_layout(name))
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1", name)


@pytest.mark.parametrize("layout", [hub_layout, memory_layout])
def test_older_layouts_are_read(pair: Pair, tmp_path: Path, layout: Callable[[str], str]) -> None:
    state = load_file(pair.folder / "model.safetensors")
    renamed = {layout(name): tensor for name, tensor in state.items()}
    same = layout is hub_layout and int(transformers.__version__.split(".")[0]) < 5  # transformers 4 writes that one
    assert (set(renamed) == set(state)) == same
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    batch = make_llava_batch(pair.folder, [[0]])
    assert torch.equal(load_model(tmp_path, scale_logits=False)(**batch), pair.ours(**batch))


@pytest.mark.parametrize("lost", ["image_newline", "multi_modal_projector.linear_1.weight"])
def test_a_missing_tensor_is_named(pair: Pair, tmp_path: Path, lost: str) -> None:
    state = load_file(pair.folder / "model.safetensors")
    del state[lost]
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=lost):
        load_model(tmp_path)


def test_fms_builds_and_loads_it_by_name(pair: Pair) -> None:
    from fms.models import get_model

    values = pair.ours.config.as_dict()
    model = get_model(
        "smolvlm_llava_next", "llava_v1_6_vicuna_7b", str(pair.folder), source="hf", **_parts(pair, values)
    )
    batch = make_llava_batch(pair.folder, [[0, 1], []])
    assert gap(model.eval()(**batch), pair.ours(**batch), batch["attention_mask"]) <= FP32_LIMIT


def test_vision_only_loading(pair: Pair) -> None:
    batch = make_llava_batch(pair.folder, [[0, 1], [2]])
    part = load_model(pair.folder, vision_only=True)
    inputs = batch["input_ids"], batch["pixel_values"], batch["image_sizes"]
    assert torch.equal(part.embed_inputs(*inputs), pair.ours.embed_inputs(*inputs))
    assert not any("layers" in name for name, _ in part.text_model.named_parameters())


def _parts(pair: Pair, values: dict[str, Any]) -> dict[str, Any]:
    config = type(pair.ours.config).from_dict(values)
    return {name: getattr(config, name) for name in values}


def test_granite_logits_are_divided_and_transformers_still_leaves_that_out(tmp_path: Path) -> None:
    """Granite was trained with divided logits. When the last line fails, transformers divides again."""
    folder = build_llava(tmp_path, "granite")
    batch = make_llava_batch(folder, [[0]])
    with torch.no_grad():
        model, peer = load_model(folder), load_llava_peer(folder)
        ours, theirs = model(**batch), peer(**batch).logits
    scale = model.config.text.logits_scaling
    assert scale == 3.0
    assert gap(ours * scale, theirs) <= FP32_LIMIT


def test_fms_own_llava_next_agrees_on_batch_row_0(tmp_path: Path) -> None:
    """FMS's model takes one row with pictures; there it must say what ours says, divided logits included."""
    from fms.models.granite import GraniteConfig
    from fms.models.llava_next import LlavaNext as Theirs
    from fms.models.llava_next import LlavaNextConfig as TheirConfig
    from fms.models.siglip_vision import SiglipVisionConfig
    from fms.utils import serialization

    folder = build_llava(tmp_path / "a", "granite")
    with torch.no_grad():
        ours = load_model(folder)
        c, v, t = ours.config, ours.config.vision, ours.config.text
        save_pretrained(ours, tmp_path / "b")
        config = TheirConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=v.hidden_size,
                intermediate_size=v.intermediate_size,
                nlayers=v.num_hidden_layers,
                nheads=v.num_attention_heads,
                image_size=v.image_size,
                patch_size=v.patch_size,
            ),
            text_config=GraniteConfig(
                src_vocab_size=t.vocab_size,
                emb_dim=t.hidden_size,
                norm_eps=t.rms_norm_eps,
                nheads=t.num_attention_heads,
                head_dim=t.head_dim,
                kvheads=t.num_key_value_heads,
                nlayers=t.num_hidden_layers,
                hidden_grow_factor=t.intermediate_size / t.hidden_size,
                multiple_of=1,
                max_expected_seq_len=t.max_position_embeddings,
                rope_theta=t.rope_theta,
                tie_heads=True,
                embedding_multiplier=t.embedding_multiplier,
                logits_scaling=t.logits_scaling,
                residual_multiplier=t.residual_multiplier,
                attention_multiplier=t.attention_scale,
            ),
            image_token_index=c.image_token_id,
            vision_feature_layer=c.vision_feature_layer,
            image_grid_pinpoints=c.image_grid_pinpoints,
        )
        theirs = Theirs(config)
        state = load_file(tmp_path / "b" / "model.safetensors")
        adapted = serialization.get_adapted("llava_next", "hf", state, {"model_config": config})
        # Its post_init copies the head to the embedding, not the other way round.
        adapted["language_model.head.weight"] = adapted["language_model.base_model.embedding.weight"]
        left_over = theirs.load_state_dict(adapted, strict=False)
        assert not left_over.unexpected_keys
        assert all(name.startswith("vision_tower.head.") for name in left_over.missing_keys)
        theirs.post_init()
        theirs.eval()
        for pictures in ([0], [1, 2]):
            batch = make_llava_batch(folder, [pictures])
            extra = {name: batch[name] for name in ("pixel_values", "image_sizes")}
            inputs, _ = theirs.prepare_inputs_for_generation(0, batch["input_ids"], dict(extra))
            assert gap(ours(**batch), theirs(inputs)) <= FP32_LIMIT
        # It splices every picture into row 0. When this fails, upstream takes batches: compare them here, too.
        batch = make_llava_batch(folder, [[0], [1]])
        extra = {name: batch[name] for name in ("pixel_values", "image_sizes")}
        with pytest.raises(RuntimeError, match="shape mismatch"):
            theirs.prepare_inputs_for_generation(0, batch["input_ids"], dict(extra))
