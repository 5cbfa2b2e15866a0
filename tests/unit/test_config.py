"""Configurations: released files with their quirks, contradictions that raise, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.config_presets import PRESETS
from smolvlm_fms.errors import ConfigurationError

RELEASED = Path(__file__).parents[1] / "fixtures" / "configs"
NAMES = sorted(path.stem for path in RELEASED.glob("*.json"))


def released(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((RELEASED / f"{name}.json").read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("name", NAMES)
def test_released_files_give_the_presets(name: str) -> None:
    config = SmolVLMConfig.from_hf(released(name))
    preset = PRESETS[name].updated(dtype=config.dtype)
    assert config == preset


@pytest.mark.parametrize(
    ("name", "tokens", "side"),
    [("256m_instruct", 64, 32), ("2.2b_instruct", 81, 27), ("idefics3_8b_llama3", 169, 26)],
)
def test_tokens_per_tile(name: str, tokens: int, side: int) -> None:
    config = SmolVLMConfig.from_hf(released(name))
    assert (config.tokens_per_tile, config.vision.patches_per_side) == (tokens, side)


@pytest.mark.parametrize("name", PRESETS)
def test_there_and_back(name: str) -> None:
    assert SmolVLMConfig.from_hf(PRESETS[name].to_hf()) == PRESETS[name]
    assert SmolVLMConfig.from_dict(PRESETS[name].as_dict()) == PRESETS[name]


def test_the_text_models_class_is_named_as_in_released_files() -> None:
    """llama.cpp's converter picks the text model by it."""
    named = ["VLlama3ForCausalLM"]  # in the released 256M and 500M; the fixture leaves it out
    assert SmolVLMConfig.from_hf(released("256m_instruct")).to_hf()["text_config"]["architectures"] == named
    granite = TextConfig(model_type="granite", attention_multiplier=0.1)
    assert granite.to_hf()["architectures"] == ["GraniteForCausalLM"]


def test_saved_file_loads(tmp_path: Path) -> None:
    PRESETS["idefics3_8b_llama3"].save(tmp_path / "own.json")
    assert SmolVLMConfig.load(tmp_path / "own.json") == PRESETS["idefics3_8b_llama3"]
    (tmp_path / "config.json").write_text(json.dumps(released("256m_instruct")), encoding="utf-8")
    assert SmolVLMConfig.from_hf(tmp_path) == SmolVLMConfig.from_hf(tmp_path / "config.json")


def test_absent_vision_fields_are_the_class_defaults() -> None:
    vision = SmolVLMConfig.from_hf(released("256m_instruct")).vision
    assert (vision.intermediate_size, vision.num_hidden_layers, vision.hidden_act) == (3072, 12, "gelu_pytorch_tanh")


def test_flat_vision_fields_are_read() -> None:
    values = released("256m_instruct")
    del values["vision_config"]
    values |= {"vision_hidden": 768, "image_size": 512, "patch_size": 16, "vision_num_attention_heads": 12}
    assert SmolVLMConfig.from_hf(values).vision == PRESETS["256m_instruct"].vision


def test_pixel_shuffle_factor_alone_is_enough() -> None:
    values = released("256m_instruct")
    del values["scale_factor"]
    assert SmolVLMConfig.from_hf(values).scale_factor == 4


def test_both_rope_vocabularies() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    four = TextConfig.from_hf({"rope_theta": 5e5, "rope_scaling": scaling})
    five = TextConfig.from_hf({"rope_parameters": {**scaling, "rope_theta": 5e5}})
    old = TextConfig.from_hf({"rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}})
    assert four == five == old and four.rope_scaling == scaling


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale_factor": 2}, "pixel_shuffle_factor"),
        ({"image_seq_len": 81}, "image_seq_len"),
        ({"image_token_id": 49280}, "image_token_id"),
        ({"model_type": "llava"}, "model_type"),
        ({"use_resampler": True}, "use_resampler"),
        ({"text": {"use_resampler": True}}, "use_resampler"),
        ({"text": {"qk_layer_norms": True}}, "qk_layer_norms"),
        ({"text": {"rope_interleaved": True}}, "rope_interleaved"),
        ({"text": {"rope_parameters": {"rope_theta": 1e4}}}, "rope_theta"),
        ({"text": {"rope_scaling": {"rope_type": "yarn"}}}, "rope_scaling"),
        ({"text": {"model_type": "gpt2"}}, "model_type"),
        ({"text": {"head_dim": 32}}, "head_dim"),
        ({"text": {"num_key_value_heads": 4}}, "num_key_value_heads"),
        ({"text": {"hidden_act": "mish"}}, "hidden_act"),
        ({"text": {"sliding_window": 128}}, "sliding_window"),
        ({"vision": {"image_size": [512, 384]}}, "image_size"),
        ({"vision": {"patch_size": 1024}}, "patch_size"),
        ({"vision": {"num_attention_heads": 7}}, "num_attention_heads"),
        ({"vision": {"image_size": 480}}, "scale_factor"),
        ({"vision": {"num_hidden_layers": 0}}, "num_hidden_layers"),
    ],
    ids=str,
)
def test_contradictions_and_what_cannot_be_honoured_raise(change: dict[str, Any], named: str) -> None:
    values = released("256m_instruct")
    text, vision = change.pop("text", {}), change.pop("vision", {})
    values |= change
    values["text_config"] |= text
    values["vision_config"] |= vision
    with pytest.raises(ConfigurationError, match=named):
        SmolVLMConfig.from_hf(values)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_damaged_files_raise(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        SmolVLMConfig.from_hf(tmp_path)


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no"):
        SmolVLMConfig.from_hf(tmp_path)


def test_unknown_names_raise() -> None:
    """FMS's own ``ModelConfig.updated`` passes them over."""
    with pytest.raises(ConfigurationError, match="scale_facter"):
        PRESETS["256m_instruct"].updated(scale_facter=4)
    with pytest.raises(ConfigurationError, match="hidden"):
        PRESETS["256m_instruct"].updated(text={"hidden": 4})
    with pytest.raises(ConfigurationError, match="layers"):
        VisionConfig.from_dict({"layers": 3})


def test_updated_leaves_the_original_alone() -> None:
    before = PRESETS["256m_instruct"].updated()
    after = before.updated(text={"num_hidden_layers": 3})
    assert (before.text.num_hidden_layers, after.text.num_hidden_layers) == (30, 3)
    after.vision.hidden_size = 4
    assert before.vision.hidden_size == 768


def test_transformers_own_defaults_do_not_fit_together() -> None:
    """Its 224 / 32 = 7 patches a side cannot be shuffled by 2; it says so only when a picture comes."""
    with pytest.raises(ConfigurationError, match="does not divide the 7 patches"):
        SmolVLMConfig()
