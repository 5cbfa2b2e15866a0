"""The tower: exact position ids, any grid, shapes, compilation; the connector's order."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_fms.config import VisionConfig
from smolvlm_fms.errors import InputError
from smolvlm_fms.modules.connector import Idefics3Connector, pixel_unshuffle
from smolvlm_fms.modules.vision import SiglipTower, grow_factor, position_ids


def tower_of(side: int = 4, **changes: int) -> SiglipTower:
    torch.manual_seed(0)
    config = VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=2 * side,
        patch_size=2,
    )  # fmt: skip
    tower = SiglipTower(config.updated(**changes))
    tower.reset_parameters()
    return tower.eval()


def corner_mask(side: int, rows: int, cols: int) -> torch.Tensor:
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, :rows, :cols] = True
    return mask


@pytest.mark.parametrize("side", [1, 7, 16, 24, 26, 27, 32, 37])
def test_a_full_tile_counts_up(side: int) -> None:
    assert position_ids(corner_mask(side, side, side), side).tolist() == [list(range(side * side))]


@pytest.mark.parametrize("side", [26, 27, 32])
def test_partial_tiles_spread_over_the_table(side: int) -> None:
    """Against exact fractions: patch i of n lies in the last bucket whose start is at or below i / n."""
    for count in range(1, side + 1):
        ids = position_ids(corner_mask(side, count, count), side).view(side, side)
        exact = [max(b for b in range(side) if Fraction(b, side) <= Fraction(i, count)) for i in range(count)]
        assert ids[:count, 0].tolist() == [b * side for b in exact]
        assert ids[0, :count].tolist() == exact
        assert not ids[count:].any() and not ids[:, count:].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_ids_stay_in_the_table(height: int, width: int, side: int) -> None:
    """Grids smaller and larger than the table, square or not."""
    ids = position_ids(torch.ones(1, height, width, dtype=torch.bool), side).view(height, width)
    assert int(ids.min()) >= 0 and int(ids.max()) < side * side
    rows, cols = ids[:, 0] // side, ids[0] % side
    assert rows.tolist() == sorted(rows.tolist()) and cols.tolist() == sorted(cols.tolist())


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 4), (3, 1), (6, 5)])
def test_a_mask_of_ones_is_no_mask(height: int, width: int) -> None:
    tower, pixels = tower_of(), torch.randn(2, 3, 2 * height, 2 * width)
    masked = tower(pixels, torch.ones(2, height, width, dtype=torch.bool))
    torch.testing.assert_close(tower(pixels), masked)


@pytest.mark.parametrize("side", [27, 32])
def test_positions_do_not_depend_on_the_dtype(side: int) -> None:
    """With constant pixels the embeddings differ by their positions alone: bf16 must choose the same rows."""
    tower = tower_of(side)
    torch.nn.init.zeros_(tower.embeddings.patch_embedding.weight)
    torch.nn.init.zeros_(tower.embeddings.patch_embedding.bias)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.copy_(torch.arange(side * side)[:, None] % 251)
    pixels = torch.zeros(1, 3, 2 * side, 2 * side)
    for rows, cols in ((side, side), (side - 1, side // 2), (side // 3, side - 2)):
        mask = corner_mask(side, rows, cols)
        single = tower.embeddings(pixels, mask)
        half = tower.bfloat16().embeddings(pixels.bfloat16(), mask)
        tower.float()
        assert torch.equal(single, half.float())


def test_padding_patches_do_not_reach_real_ones() -> None:
    tower, pixels = tower_of(), torch.randn(1, 3, 8, 8)
    mask = corner_mask(4, 3, 4)
    changed = pixels.clone()
    changed[:, :, 6:] = 9.0
    before, after = tower(pixels, mask), tower(changed, mask)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_hidden_states() -> None:
    tower, pixels = tower_of(), torch.randn(2, 3, 8, 8)
    features, states = tower(pixels, output_hidden_states=True)
    assert len(states) == 3 and all(state.shape == (2, 16, 16) for state in states)
    assert torch.equal(tower.post_layernorm(states[-1]), features)


def test_pixels_are_cast_to_the_towers_dtype() -> None:
    assert tower_of().bfloat16()(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tower, pixels = tower_of().train(), torch.randn(1, 3, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        tower.gradient_checkpointing = checkpointing
        tower.zero_grad()
        tower(pixels).square().sum().backward()
        gradients.append(tower.embeddings.patch_embedding.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("masked", [False, True])
def test_one_graph(masked: bool) -> None:
    tower, pixels = tower_of(), torch.randn(2, 3, 8, 8)
    mask = corner_mask(4, 3, 4).expand(2, 4, 4) if masked else None
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pixels, mask), tower(pixels, mask))


def test_pixel_unshuffle_order() -> None:
    """Block rows first, then columns, then features."""
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pixel_unshuffle(grid, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(pixel_unshuffle(grid, 1), grid)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_pixel_unshuffle_loses_nothing(out: int, factor: int, count: int, width: int) -> None:
    side = out * factor
    features = torch.randn(count, side * side, width)
    folded = pixel_unshuffle(features, factor)
    assert folded.shape == (count, out * out, width * factor**2)
    back = folded.view(count, out, out, factor, factor, width).transpose(2, 3).reshape(features.shape)
    assert torch.equal(back, features)


@pytest.mark.parametrize(("patches", "factor"), [(15, 1), (16, 3), (49, 2)])
def test_grids_that_cannot_be_unshuffled(patches: int, factor: int) -> None:
    with pytest.raises(InputError, match=f"{patches} patches"):
        pixel_unshuffle(torch.zeros(1, patches, 4), factor)


def test_the_connector_is_one_graph() -> None:
    connector = Idefics3Connector(16, 8, 2)
    connector.reset_parameters()
    features = torch.randn(2, 16, 16)
    compiled = torch.compile(connector, backend="eager", fullgraph=True)
    assert torch.equal(compiled(features), connector(features)) and connector(features).shape == (2, 4, 8)


def test_fms_widths_are_exact() -> None:
    """FMS multiplies width by a factor and cuts: every size up to SO400M's must survive."""
    for width in (36, 48, 576, 768, 960, 1152, 2048, 4096):
        for hidden in (*range(1, 200), 1536, 2560, 3072, 4304, 8192, 14336):
            assert int(grow_factor(width, hidden) * width) == hidden
