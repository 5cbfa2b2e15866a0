"""State-dict steps: pure, idempotent, exact in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fms.utils import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import smolvlm_fms
from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.errors import CheckpointError
from smolvlm_fms.fms_bridge.adapters import (
    FAMILIES,
    SOURCES,
    STEPS,
    canonical_name,
    from_source,
    fuse,
    group_of,
    split,
    to_hf,
)
from smolvlm_fms.model.smolvlm import SmolVLM

assert smolvlm_fms  # registers with FMS
FAMILY = FAMILIES["smolvlm"]


def config_of(heads: int = 4, kv: int = 2, head_dim: int = 6, **changes: Any) -> SmolVLMConfig:
    text = TextConfig(
        vocab_size=40, hidden_size=heads * head_dim, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=32, attention_bias=True,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    return SmolVLMConfig(vision, text, scale_factor=2, image_token_id=30, **changes)


def state_of(config: SmolVLMConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = SmolVLM(config)
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(1, 1), (2, 1), (4, 4), (6, 3), (9, 3)]), st.sampled_from([2, 4, 6, 64]), st.booleans())
def test_there_and_back_is_exact(heads: tuple[int, int], head_dim: int, fused: bool) -> None:
    config = config_of(*heads, head_dim, fused_weights=fused)
    state = state_of(config)
    theirs = to_hf(FAMILY, state, config)
    assert same(from_source(FAMILY, "hf", theirs, config), state)
    assert same(to_hf(FAMILY, from_source(FAMILY, "hf", theirs, config), config), theirs)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fused", [True, False])
def test_every_step_is_pure_and_idempotent(source: str, fused: bool) -> None:
    config = config_of(fused_weights=fused)
    ours = state_of(config)
    state: Any = to_hf(FAMILY, ours, config) if source == "hf" else ours
    for name in SOURCES[source]:
        step = STEPS[name](FAMILY)
        before = {n: t.clone() for n, t in state.items()}
        once = step(state, model_config=config)
        assert same(state, before), f"{name} changed its input"
        assert same(step(once, model_config=config), once), f"{name} is not idempotent"
        state = once
    assert same(state, ours)
    assert same(from_source(FAMILY, source, state, config), ours)  # and the whole chain on its own result


def test_rotary_order_is_undone_head_by_head() -> None:
    """Hugging Face turns features i and i + d/2 together, FMS neighbours; v and the tower's q, k stay as they are."""
    config = config_of(heads=2, kv=2, head_dim=4, fused_weights=False)
    names = [f"model.text_model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    rows = torch.arange(8.0)[:, None].expand(8, 8)
    tower = "model.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    ours = from_source(FAMILY, "hf", {**dict.fromkeys(names, rows), tower: rows}, config)
    pairs = [0, 2, 1, 3, 4, 6, 5, 7]
    layer = "text_model.base_model.layers.0.attn.in_proj."
    assert ours[layer + "query.weight"][:, 0].tolist() == pairs
    assert ours[layer + "key.weight"][:, 0].tolist() == pairs
    assert ours[layer + "value.weight"][:, 0].tolist() == list(range(8))
    assert ours["vision_tower.layers.0.attn.in_proj.query.weight"][:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("model.text_model.layers.3.input_layernorm.weight", "model.text_model.layers.3.input_layernorm.weight"),
        ("text_model.norm.weight", "model.text_model.norm.weight"),
        ("model.text_model.model.layers.0.mlp.up_proj.weight", "model.text_model.layers.0.mlp.up_proj.weight"),
        ("vision_model.post_layernorm.bias", "model.vision_model.post_layernorm.bias"),
        ("connector.modality_projection.proj.weight", "model.connector.modality_projection.proj.weight"),
        ("model.text_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("text_model.base_model.layers.0.ln.weight", "text_model.base_model.layers.0.ln.weight"),
        ("text_model.head.weight", "text_model.head.weight"),
        ("connector.proj.weight", "connector.proj.weight"),
        ("model.text_model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.vision_model.embeddings.position_ids", None),
    ],
)
def test_older_names(old: str, name: str | None) -> None:
    assert canonical_name(FAMILY, old) == name
    assert name is None or canonical_name(FAMILY, name) == name


def test_groups_hold_what_a_step_needs_together() -> None:
    assert group_of("model.text_model.layers.12.mlp.up_proj.weight") == "model.text_model.layers.12."
    assert group_of("lm_head.weight") == group_of("model.text_model.embed_tokens.weight") == ""


def test_fusing_and_splitting() -> None:
    config = config_of()
    state = state_of(config)
    parts = split(state, config)
    assert not any("fused" in name for name in parts)
    assert same(fuse(parts), state)
    bad = {"text_model.base_model.layers.0.attn.in_proj.qkv_fused.weight": torch.zeros(49, 24)}
    with pytest.raises(CheckpointError, match="49 rows"):
        split(bad, config)


def test_tied_head() -> None:
    config = config_of(tie_word_embeddings=True)
    head, embedding = "text_model.head.weight", "text_model.base_model.embedding.weight"
    weight = torch.randn(40, 24)
    step = STEPS["tied_head"](FAMILY)
    for state in ({embedding: weight}, {head: weight}, {embedding: weight, head: weight.clone()}):
        result = step(state, model_config=config)
        assert list(result) == [embedding] and torch.equal(result[embedding], weight)
    with pytest.raises(CheckpointError, match="two different tensors"):
        step({embedding: weight, head: weight + 1}, model_config=config)
    both = {embedding: weight, head: weight + 1}
    assert same(step(both, model_config=config_of()), both)
    assert "lm_head.weight" not in to_hf(FAMILY, state_of(config), config)
    assert "lm_head.weight" in to_hf(FAMILY, state_of(config_of()), config_of())


def test_unknown_tensors_raise_in_both_directions() -> None:
    with pytest.raises(CheckpointError, match="perceiver"):
        from_source(FAMILY, "hf", {"model.perceiver.weight": torch.zeros(1)}, config_of())
    with pytest.raises(CheckpointError, match="extra"):
        to_hf(FAMILY, {"extra.weight": torch.zeros(1)}, config_of())


def test_quantised_tensors_change_order_with_their_rows() -> None:
    """Per-row scales move with the rows, GPTQ's columns with the outputs; asymmetric packed zeros are refused."""
    config = config_of(heads=2, kv=2, head_dim=4, fused_weights=False)
    stem = "model.text_model.layers.0.self_attn.q_proj."
    order = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])
    state = {
        stem + "weight": torch.randint(-9, 9, (8, 8), dtype=torch.int8),
        stem + "scale": torch.rand(8),
        stem + "qweight": torch.randint(0, 99, (2, 8), dtype=torch.int32),
        stem + "scales": torch.rand(2, 8),
        stem + "qzeros": torch.full((2, 1), 7, dtype=torch.int32),
        stem + "g_idx": torch.arange(16),
    }
    ours = from_source(FAMILY, "hf", state, config)
    mine = "text_model.base_model.layers.0.attn.in_proj.query."
    for leaf in ("weight", "scale"):
        assert torch.equal(ours[mine + leaf], state[stem + leaf][order])
    for leaf in ("qweight", "scales"):
        assert torch.equal(ours[mine + leaf], state[stem + leaf][:, order])
    for leaf in ("qzeros", "g_idx"):
        assert torch.equal(ours[mine + leaf], state[stem + leaf])
    assert same(to_hf(FAMILY, ours, config), state)
    with pytest.raises(CheckpointError, match="asymmetric"):
        from_source(FAMILY, "hf", {stem + "qzeros": torch.tensor([[1], [2]])}, config)
    with pytest.raises(CheckpointError, match="fused_weights=False"):
        from_source(FAMILY, "hf", {n.replace("q_proj", f"{p}_proj"): t for p in "qkv" for n, t in state.items()},
                    config.updated(fused_weights=True))  # fmt: skip


def test_fms_knows_every_step_and_source() -> None:
    from fms import models

    assert "smolvlm" in models.list_models()
    assert set(serialization.list_sources("smolvlm")) == set(SOURCES)
    config = config_of()
    ours = state_of(config)
    theirs = to_hf(FAMILY, ours, config)
    adapted = serialization.get_adapted("smolvlm", "hf", theirs, {"model_config": config})
    assert same(dict(adapted), ours)
