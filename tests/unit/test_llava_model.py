"""LLaVA-Next's modules and model, without transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smolvlm_fms.config import TextConfig
from smolvlm_fms.config_llava import LlavaNextConfig, LlavaVisionConfig
from smolvlm_fms.errors import InputError, TokenCountError
from smolvlm_fms.model.llava_next import LlavaNext, PictureFeatures, pictures_per_row
from smolvlm_fms.modules.projector import join_tiles, tapped_features

IMAGE = 60
SIZES = [[60, 40], [31, 100], [28, 28]]


def config(tower: str = "siglip_vision_model", **changes: Any) -> LlavaNextConfig:
    siglip = tower == "siglip_vision_model"
    vision = LlavaVisionConfig(
        model_type=tower,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        hidden_act="gelu_pytorch_tanh" if siglip else "quick_gelu",
    )
    text = TextConfig(
        model_type="granite",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        embedding_multiplier=3.0,
    )
    values: dict[str, Any] = {
        "image_token_id": IMAGE,
        "vision_feature_layer": [-3, 1, -1],
        "vision_feature_select_strategy": "full" if siglip else "default",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28]],
    }
    return LlavaNextConfig(vision, text, **(values | changes))


@pytest.fixture(scope="module", params=["siglip_vision_model", "clip_vision_model"])
def model(request: pytest.FixtureRequest) -> LlavaNext:
    torch.manual_seed(0)
    model = LlavaNext(config(request.param))
    model.reset_parameters()
    model.post_init()
    return model.eval()


def batch(model: LlavaNext, *rows: list[int | str]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask; ``"i"`` stands for picture i of SIZES."""
    tokens = [model.config.resolution.num_tokens((h, w)) for h, w in SIZES]
    ids = [[t for p in row for t in ([IMAGE] * tokens[int(p)] if isinstance(p, str) else [p])] for row in rows]
    longest = max(map(len, ids))
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor([[0] * (longest - len(row)) + row for row in ids]), torch.tensor(mask)


def test_taps_are_the_hidden_states_of_the_whole_tower(model: LlavaNext) -> None:
    pixels = torch.randn(2, 3, 28, 28)
    _, states = model.vision_tower(pixels, output_hidden_states=True)
    for layers in ([-1], [0], [-4, 3, 2], [1, 1]):
        expected = torch.cat([states[layer] for layer in layers], -1)
        torch.testing.assert_close(tapped_features(model.vision_tower, pixels, layers), expected, rtol=0, atol=0)


def test_blocks_behind_the_deepest_tap_do_not_run(model: LlavaNext) -> None:
    calls: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(model.vision_tower.layers)
    ]
    tapped_features(model.vision_tower, torch.randn(1, 3, 28, 28), [-3, -2])
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1]


def test_tiles_are_read_line_by_line_across_the_grid() -> None:
    # Every patch of the 2 × 3 grid says its own place in the picture: line · 100 + column.
    rows, cols, side = 2, 3, 4
    place = torch.arange(rows * side)[:, None] * 100 + torch.arange(cols * side)
    tiles = place.view(rows, side, cols, side).transpose(1, 2).reshape(rows * cols, side * side, 1).float()
    overview = torch.full((1, side * side, 1), -1.0)
    joined = join_tiles(torch.cat((overview, tiles)), torch.tensor([-9.0]), (rows, cols), (0, 2))
    expected = torch.cat((place[:, 2:-2].float(), torch.full((rows * side, 1), -9.0)), 1).flatten()
    torch.testing.assert_close(joined[: side * side, 0], torch.full((side * side,), -1.0))
    torch.testing.assert_close(joined[side * side :, 0], expected)


def test_a_row_does_not_depend_on_its_neighbours(model: LlavaNext) -> None:
    pixels, sizes = torch.randn(3, 5, 3, 28, 28), torch.tensor(SIZES)
    ids, mask = batch(model, [1, "0", 2, "1"], [3, 4], [5, "2", 6])
    logits = model(ids, pixels, sizes, attention_mask=mask)
    for row, pictures in enumerate(([0, 1], [], [2])):
        real = mask[row].bool()
        alone = model(ids[row][real][None], pixels[pictures], sizes[pictures])
        torch.testing.assert_close(logits[row][real], alone[0], rtol=1e-4, atol=1e-5)


def test_what_pads_the_tiles_is_never_read(model: LlavaNext) -> None:
    pixels, sizes = torch.randn(2, 7, 3, 28, 28), torch.tensor(SIZES[:2])
    ids, mask = batch(model, ["0", 1], ["1", 2])
    expected = model(ids, pixels, sizes, attention_mask=mask)
    counts = [model.config.resolution.num_tiles((h, w)) for h, w in SIZES[:2]]
    for picture, count in enumerate(counts):
        pixels[picture, count:] = float("nan")
    torch.testing.assert_close(model(ids, pixels, sizes, attention_mask=mask), expected, rtol=0, atol=0)
    listed = [pixels[i, :count] for i, count in enumerate(counts)]
    torch.testing.assert_close(model(ids, listed, sizes, attention_mask=mask), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(ids, torch.cat(listed), sizes, attention_mask=mask), expected, rtol=0, atol=0)


def test_the_embedding_multiplier_scales_image_features_too(model: LlavaNext) -> None:
    pixels, sizes = torch.randn(1, 5, 3, 28, 28), torch.tensor(SIZES[:1])
    ids, _ = batch(model, ["0", 1])
    embeddings = model.embed_inputs(ids, pixels, sizes)
    _, states = model(ids, pixels, sizes, output_hidden_states=True)
    torch.testing.assert_close(states[0], embeddings * 3.0)
    torch.testing.assert_close(embeddings[0, :-1], model.encode_images(pixels, sizes).features[0])


def test_the_hook_and_the_cache_agree_with_forward(model: LlavaNext) -> None:
    pixels, sizes = torch.randn(2, 5, 3, 28, 28), torch.tensor(SIZES[:2])
    ids, mask = batch(model, ["0", 1, "1", 2], [3, 4])
    expected = model(ids, pixels, sizes, attention_mask=mask)
    left_ids, left = model.prepare_inputs(0, ids, {"pixel_values": pixels, "image_sizes": sizes, "use_cache": True})
    assert "pixel_values" not in left and "image_sizes" not in left
    logits, cache = model(left_ids[:, :-1], attention_mask=mask[:, :-1], **left)
    torch.testing.assert_close(logits, expected[:, :-1], rtol=1e-4, atol=1e-5)
    last_ids, left = model.prepare_inputs(1, ids[:, -1:], {**left, "past_key_value_states": cache})
    assert "image_hidden_states" not in left
    last, _ = model(last_ids, attention_mask=mask, **left)
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_a_generated_image_token_is_no_placeholder(model: LlavaNext) -> None:
    pixels, sizes = torch.randn(2, 5, 3, 28, 28), torch.tensor(SIZES[:2])
    ids, _ = batch(model, ["0", 1, "1", 2])
    _, left = model.prepare_inputs(0, ids, {"pixel_values": pixels, "image_sizes": sizes})
    longer = torch.cat((ids, torch.tensor([[IMAGE, 7]])), 1)
    longer_ids, left = model.prepare_inputs(1, longer, left)
    states = model(longer_ids, output_hidden_states=True, **left)[1]
    expected = model.text_model.base_model.embed(longer[:, -2:]) * model.config.text.embedding_multiplier
    assert torch.equal(states[0][:, -2:], expected)
    torch.testing.assert_close(states[0][:, :-2], model(ids, pixels, sizes, output_hidden_states=True)[1][0])


def test_counts_are_checked_row_by_row(model: LlavaNext) -> None:
    pixels, sizes = torch.randn(3, 5, 3, 28, 28), torch.tensor(SIZES)
    ids, _ = batch(model, ["0", 1], [2], ["2", 1])
    with pytest.raises(TokenCountError, match=r"Row 2: .*<image> placeholders"):
        model(ids, pixels, sizes)  # the second picture has no placeholders, so row 2 gets the wrong one
    ids, _ = batch(model, ["0", 1], ["1", 2])
    with pytest.raises(TokenCountError, match="1 of 3 pictures are left over"):
        model(ids, pixels, sizes)
    with pytest.raises(TokenCountError, match="image features came"):
        model(ids, image_hidden_states=torch.randn(3, 16))
    cut = ids[:, :-10]
    with pytest.raises(TokenCountError, match="Row 0"):
        model(cut, pixels[:2], sizes[:2])


def test_pictures_per_row_counts_and_names_the_row() -> None:
    assert pictures_per_row([5, 0, 3, 4], [2, 3, 3, 4]) == [2, 0, 1, 1]
    with pytest.raises(TokenCountError, match=r"Row 1: .* 4 <image>.* 3 image features \(3\)"):
        pictures_per_row([5, 4], [5, 3])
    with pytest.raises(TokenCountError, match=r"0 image features \(none\)"):
        pictures_per_row([5], [])


def test_text_alone_needs_no_pictures(model: LlavaNext) -> None:
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids)
    torch.testing.assert_close(model(ids, torch.zeros(0, 5, 3, 28, 28), torch.zeros(0, 2, dtype=torch.long)), expected)
    torch.testing.assert_close(model(ids, image_hidden_states=PictureFeatures(())), expected)


def test_what_does_not_fit_is_refused(model: LlavaNext) -> None:
    ids, _ = batch(model, ["0"])
    pixels, sizes = torch.randn(1, 5, 3, 28, 28), torch.tensor(SIZES[:1])
    for arguments, words in (
        ((ids, pixels), "without image_sizes"),
        ((ids, pixels[:, :2], sizes), "2 tiles"),
        ((ids, pixels[0, :4], sizes), "4 tiles"),
        ((ids, pixels, torch.tensor(SIZES)), "1 row of image_sizes|one row of image_sizes"),
        ((ids, pixels, [[1, 2, 3]]), "height and width"),
        ((ids, torch.randn(1, 5, 3, 14, 14), sizes), "28 × 28"),
        ((torch.randn(1, 4, 16), pixels, sizes), "token ids"),
    ):
        with pytest.raises(InputError, match=words):
            model(*arguments)
    with pytest.raises(InputError, match="not both"):
        model(ids, pixels, sizes, image_hidden_states=torch.randn(3, 16))


def test_gradients_reach_the_tapped_layers_the_projector_and_the_newline() -> None:
    torch.manual_seed(0)
    model = LlavaNext(config(vision_feature_layer=[-3, -2]))
    model.reset_parameters()
    model.post_init()
    model.vision_tower.gradient_checkpointing = True
    ids, _ = batch(model, ["0", 1])
    model(ids, torch.randn(1, 5, 3, 28, 28), torch.tensor(SIZES[:1])).logsumexp(-1).sum().backward()
    assert model.image_newline.grad is not None and bool(model.image_newline.grad.any())
    assert {name for name, p in model.named_parameters() if p.grad is None} == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("vision_tower.layers.2.", "vision_tower.post_"))
    }


def test_vision_only_keeps_tower_projector_newline_and_embeddings() -> None:
    model = LlavaNext(config(), vision_only=True)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"vision_tower", "projector", "image_newline", "text_model"}
    model.reset_parameters()
    model.post_init()
    ids, _ = batch(model, ["0", 1])
    assert model.embed_inputs(ids, torch.randn(1, 5, 3, 28, 28), torch.tensor(SIZES[:1])).shape == (*ids.shape, 16)
