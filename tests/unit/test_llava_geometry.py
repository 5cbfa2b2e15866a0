"""LLaVA-Next's configuration and any-resolution geometry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvlm_fms.config_llava import LLAVA_PRESETS, AnyResolution, LlavaNextConfig, LlavaVisionConfig
from smolvlm_fms.errors import ConfigurationError, InputError

CLIP = AnyResolution(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), tile=336, patches=24)
GRANITE = LLAVA_PRESETS["granite_vision_3_2_2b"].resolution
SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


def test_the_published_example_of_llava_1_6_has_its_published_number_of_tokens() -> None:
    # A square picture: 2×2 tiles, 48 lines of 48 patches and a newline, and the overview's 576.
    assert CLIP.canvas((1000, 1000)) == (672, 672)
    assert CLIP.num_tiles((1000, 1000)) == 5
    assert CLIP.num_tokens((1000, 1000)) == 576 + 48 * 49


def test_a_portrait_picture_is_height_first() -> None:
    assert CLIP.grid((3000, 500)) == (3, 1)
    assert CLIP.grid((500, 3000)) == (1, 3)
    assert CLIP.fitted((3000, 500)) == (1008, 168)
    assert CLIP.unpadded((3000, 500)) == (72, 12)
    assert CLIP.padding((3000, 500)) == (0, 6)


def test_unpadding_rounds_before_it_cuts() -> None:
    # 3 · (100 / 3 …) style products fall a hair short of the whole number: 45 · (21 / 45) is 20.999999999999996.
    squares = AnyResolution(((28, 28),), tile=28, patches=21)
    lost = [side for side in range(22, 400) if int(side * (21 / side)) != 21]
    assert lost, "no size on which plain truncation fails; the test would prove nothing"
    for side in lost:
        assert squares.unpadded((side, side)) == (21, 21)


def test_a_sliver_may_have_no_line_of_its_own() -> None:
    assert CLIP.unpadded((1, 5000))[0] in (0, 1)
    assert CLIP.num_tokens((1, 5000)) >= 576


@given(SIZES)
def test_the_picture_fits_its_canvas_and_padding_is_on_one_axis(size: tuple[int, int]) -> None:
    for geometry in (CLIP, GRANITE):
        canvas, fitted = geometry.canvas(size), geometry.fitted(size)
        assert canvas in geometry.pinpoints
        assert fitted[0] == canvas[0] or fitted[1] == canvas[1]
        assert 1 <= fitted[0] <= canvas[0] and 1 <= fitted[1] <= canvas[1]
        rows, cols = geometry.grid(size)
        top, left = geometry.padding(size)
        assert min(top, left) == 0
        left_over = geometry.unpadded(size)
        assert 0 <= left_over[0] <= rows * geometry.patches and 0 <= left_over[1] <= cols * geometry.patches
        assert geometry.num_tokens(size) == geometry.patches**2 + left_over[0] * (left_over[1] + 1)


@given(SIZES)
def test_turning_a_picture_turns_its_canvas(size: tuple[int, int]) -> None:
    # Both pinpoint lists are symmetric; ties between a canvas and its mirror image cannot happen unless h = w.
    for geometry in (CLIP, GRANITE):
        turned = geometry.canvas((size[1], size[0]))
        assert turned[0] * turned[1] == geometry.canvas(size)[0] * geometry.canvas(size)[1]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_empty_pictures_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        CLIP.num_tokens(size)


@pytest.mark.parametrize("name", LLAVA_PRESETS)
def test_presets_survive_both_vocabularies(name: str) -> None:
    config = LLAVA_PRESETS[name]
    assert LlavaNextConfig.from_hf(config.to_hf()) == config
    assert LlavaNextConfig.from_dict(config.as_dict()) == config


def test_granite_vision_taps_four_layers_of_a_tower_without_a_class_token() -> None:
    config = LLAVA_PRESETS["granite_vision_3_2_2b"]
    assert config.feature_layers == (-24, -20, -12, -1)
    assert (config.vision.patches_per_side, config.tokens_per_tile) == (27, 729)
    assert not config.vision.has_class_token
    assert len(config.image_grid_pinpoints) == 27
    assert max(GRANITE.num_tiles(p) for p in GRANITE.pinpoints) == 11


def test_absent_fields_have_the_defaults_of_their_own_family() -> None:
    config = LlavaNextConfig.from_hf({"model_type": "llava_next", "text_config": {"vocab_size": 32064}})
    assert config.vision == LlavaVisionConfig()
    assert config.text.model_type == "llama"
    siglip = LlavaVisionConfig.from_hf({"model_type": "siglip_vision_model"})
    assert (siglip.hidden_size, siglip.patch_size, siglip.layer_norm_eps) == (768, 16, 1e-6)
    clip = LlavaVisionConfig.from_hf({"hidden_size": 768})
    assert (clip.patch_size, clip.hidden_act, clip.layer_norm_eps) == (32, "quick_gelu", 1e-5)
    granite = {"model_type": "granite", "vocab_size": 32064}
    assert LlavaNextConfig.from_hf({"model_type": "llava_next", "text_config": granite}).text.attention_scale == 1.0


def test_a_sliding_window_is_refused_even_where_only_the_default_sets_one() -> None:
    values = {"model_type": "llava_next", "text_config": {"model_type": "mistral", "vocab_size": 32064}}
    with pytest.raises(ConfigurationError, match="sliding_window is 4096"):
        LlavaNextConfig.from_hf(values)
    values["text_config"]["sliding_window"] = None  # type: ignore[index]
    config = LlavaNextConfig.from_hf(values)
    assert config.text.num_key_value_heads == 8
    assert config.to_hf()["text_config"]["sliding_window"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, "class token"),
        ({"vision_feature_layer": 25}, "24 layers"),
        ({"vision_feature_layer": [-2, -26]}, "24 layers"),
        ({"vision_feature_layer": []}, "at least one"),
        ({"image_grid_pinpoints": [[336, 500]]}, "whole number of tiles"),
        ({"image_grid_pinpoints": []}, "empty"),
        ({"image_grid_pinpoints": [336, 672]}, "pairs"),
        ({"image_token_id": 40000}, "vocab_size"),
        ({"model_type": "llava"}, "llava_next"),
    ],
)
def test_contradictions_are_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LLAVA_PRESETS["llava_v1_6_vicuna_7b"].updated(**change)
