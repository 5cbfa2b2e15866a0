"""Placing image features: counts by row, errors that say where, padding tiles that are counted and not guessed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.errors import InputError, TokenCountError
from smolvlm_fms.model.packing import pack, patch_mask
from smolvlm_fms.model.smolvlm import ImageFeatures, SmolVLM

IMAGE = 29


@pytest.fixture(scope="module")
def model() -> SmolVLM:
    """Four image tokens a tile of 8 by 8 pixels."""
    torch.manual_seed(0)
    text = TextConfig(
        vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    result = SmolVLM(SmolVLMConfig(vision, text, scale_factor=2, image_token_id=IMAGE)).eval()
    result.reset_parameters()
    return result


def ids_of(*tiles: int, length: int = 16) -> Tensor:
    rows = [[5, *[IMAGE] * (4 * n), *range(6, 6 + length - 1 - 4 * n)] for n in tiles]
    return torch.tensor(rows)


def run(model: SmolVLM, *arguments: Any, **named: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(*arguments, **named)
    return result


def test_pack_places_features_in_order_and_casts_them() -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, 2], [IMAGE, 3, 4, IMAGE]])
    features = torch.arange(4.0, dtype=torch.float64).view(2, 2, 1) + 10
    packed = pack(torch.zeros(2, 4, 1), ids, features, IMAGE, [1, 1])
    assert packed.dtype == torch.float32
    assert packed[..., 0].tolist() == [[0, 10, 11, 0], [12, 0, 0, 13]]


@pytest.mark.parametrize(
    ("tiles", "meant", "message"),
    [
        ([1, 2], [1, 1], "Row 1: the text has 4 <image> placeholders, but the row's 2 tiles give 8"),
        ([1, 1], [1, 2], "Row 1: the text has 8 <image> placeholders, but the row's 1 tiles give 4"),
        ([2, 1], [1, 2], "Row 0: "),  # the sums agree; transformers would mix the rows up
        ([1, 0], [0, 0], "Row 0: the text has 0"),
    ],
)
def test_counts_are_compared_row_by_row(model: SmolVLM, tiles: list[int], meant: list[int], message: str) -> None:
    pixels, mask = torch.randn(2, 2, 3, 8, 8), torch.zeros(2, 2, 8, 8)
    for row, count in enumerate(tiles):
        mask[row, :count] = 1
    with pytest.raises(TokenCountError, match=re.escape(message)):
        run(model, ids_of(*meant), pixel_values=pixels, pixel_attention_mask=mask)


def test_the_error_names_the_tile_and_the_cause(model: SmolVLM) -> None:
    cut = ids_of(2)[:, :7]
    with pytest.raises(TokenCountError, match=r"8 image features \(2 × 4\); they part at tile 1\..*truncation"):
        run(model, cut, pixel_values=torch.randn(1, 2, 3, 8, 8))


def test_a_black_tile_is_a_picture(model: SmolVLM) -> None:
    """transformers takes a tile of zeros for padding; a mid-grey one, after normalisation, is all zeros."""
    pixels = torch.randn(1, 2, 3, 8, 8)
    pixels[0, 1] = 0
    mask = torch.ones(1, 2, 8, 8)
    logits = run(model, ids_of(2), pixel_values=pixels, pixel_attention_mask=mask)
    assert torch.equal(run(model, ids_of(2), pixel_values=pixels), logits)  # placeholders alone say it, too
    features = model.encode_images(pixels, mask)
    assert features.tiles_per_row == [2] and features.features.shape == (2, 4, 24)


def test_padding_tiles_without_a_mask_are_counted_by_placeholders(model: SmolVLM) -> None:
    pixels = torch.randn(3, 2, 3, 8, 8)
    pixels[1, 1:] = 0
    pixels[2] = 0
    mask = torch.ones(3, 2, 8, 8)
    mask[1, 1:] = mask[2] = 0
    with_mask = run(model, ids_of(2, 1, 0), pixel_values=pixels, pixel_attention_mask=mask)
    assert torch.equal(run(model, ids_of(2, 1, 0), pixel_values=pixels), with_mask)
    pixels[2, 1, 0, 0, 0] = 1.0  # not blank, so not padding: this row's counts do not fit
    with pytest.raises(TokenCountError, match=r"Row 2"):
        run(model, ids_of(2, 1, 0), pixel_values=pixels)


def test_no_pictures_in_some_rows_or_in_all(model: SmolVLM) -> None:
    text_only = run(model, ids_of(0, 0))
    empty = torch.zeros(2, 0, 3, 8, 8)
    assert torch.equal(run(model, ids_of(0, 0), pixel_values=empty), text_only)
    assert torch.equal(run(model, ids_of(0, 0), pixel_values=torch.zeros(2, 1, 3, 8, 8)), text_only)
    pixels = torch.zeros(2, 1, 3, 8, 8)
    pixels[1] = torch.randn(3, 8, 8)
    torch.testing.assert_close(run(model, ids_of(0, 1), pixel_values=pixels)[0], text_only[0])  # [[], [picture]]


def test_rows_do_not_depend_on_their_neighbours(model: SmolVLM) -> None:
    pixels = torch.randn(3, 3, 3, 8, 8)
    mask = torch.ones(3, 3, 8, 8)
    mask[0, 1:] = mask[1] = 0
    mask[2, 2, 5:] = 0  # a tile that is padded itself
    batch = run(model, ids_of(1, 0, 3), pixel_values=pixels, pixel_attention_mask=mask)
    for row, tiles in enumerate((1, 0, 3)):
        alone = run(model, ids_of(tiles), pixel_values=pixels[row : row + 1], pixel_attention_mask=mask[row : row + 1])
        torch.testing.assert_close(batch[row], alone[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_take_the_texts_dtype(model: SmolVLM, dtype: torch.dtype) -> None:
    half = SmolVLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(dtype).post_init()
    logits = run(half.eval(), ids_of(1), pixel_values=torch.randn(1, 1, 3, 8, 8))
    assert logits.dtype == dtype and logits.isfinite().all()


def test_encoded_features_replace_pixels(model: SmolVLM) -> None:
    pixels = torch.randn(2, 1, 3, 8, 8)
    with torch.no_grad():
        features = model.encode_images(pixels)
    expected = run(model, ids_of(1, 1), pixel_values=pixels)
    assert torch.equal(run(model, ids_of(1, 1), image_hidden_states=features), expected)
    assert torch.equal(run(model, ids_of(1, 1), image_hidden_states=features.features), expected)
    with pytest.raises(TokenCountError, match="Row 0"):
        run(model, ids_of(1, 1), image_hidden_states=ImageFeatures(features.features, [2, 0]))
    with pytest.raises(InputError, match="not both"):
        run(model, ids_of(1, 1), pixel_values=pixels, image_hidden_states=features)


def test_embeddings_instead_of_ids(model: SmolVLM) -> None:
    pixels = torch.randn(1, 1, 3, 8, 8)
    with torch.no_grad():
        embeddings = model.embed_inputs(ids_of(1), pixels)
    assert torch.equal(run(model, embeddings), run(model, ids_of(1), pixel_values=pixels))
    with pytest.raises(InputError, match="token ids are needed"):
        run(model, embeddings, pixel_values=pixels)


@pytest.mark.parametrize(
    ("pixels", "mask"),
    [((3, 8, 8), None), ((1, 3, 8, 8), None), ((1, 1, 3, 8, 8), (1, 8, 8)), ((1, 1, 3, 8, 8), (1, 1, 8))],
)
def test_shapes_that_are_none(model: SmolVLM, pixels: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match=r"pixel_(values|attention_mask)"):
        model.encode_images(torch.zeros(pixels), None if mask is None else torch.zeros(mask))


def test_tiles_of_another_size_raise(model: SmolVLM) -> None:
    with pytest.raises(InputError, match="A patch of 12×12 pixels became 9 tokens, not 4"):
        run(model, ids_of(1), pixel_values=torch.randn(1, 1, 3, 12, 12))


def test_patch_mask() -> None:
    mask = torch.zeros(1, 6, 4, dtype=torch.long)
    mask[0, 0, 0] = mask[0, 3, 3] = 1
    assert patch_mask(mask, 2).tolist() == [[[True, False], [False, True], [False, False]]]


def test_vision_only_cannot_make_logits(model: SmolVLM) -> None:
    part = SmolVLM(model.config, vision_only=True)
    with pytest.raises(InputError, match="vision_only"):
        part(ids_of(0))
