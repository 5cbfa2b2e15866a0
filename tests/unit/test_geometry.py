"""Tile grids and token counts: known values, laws that hold for every size, and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_fms.errors import ImageError, InputError
from smolvlm_fms.processing.geometry import (
    MAX_EDGE,
    center_crop_box,
    fit_to_tiles,
    image_token_count,
    plan_tiles,
    resize_to_longest_edge,
    tile_boxes,
    tile_count,
    tokens_per_tile,
)

SIDES = st.integers(1, 12_000)


@pytest.mark.parametrize(
    ("source", "resized", "canvas", "grid"),
    [
        ((3000, 4000), (1536, 2048), (1536, 2048), (3, 4)),
        ((386, 386), (2048, 2048), (2048, 2048), (4, 4)),
        ((1, 10_000), (1, 2048), (512, 2048), (1, 4)),
        ((10_000, 1), (2048, 1), (2048, 512), (4, 1)),
        ((1080, 1920), (1152, 2048), (1536, 2048), (3, 4)),
        ((1000, 999), (2048, 2046), (2048, 2048), (4, 4)),
    ],
)
def test_known_pictures_of_the_256m(source, resized, canvas, grid):
    plan = plan_tiles(*source, size=2048, tile=512)
    assert (plan.source, plan.resized, plan.canvas, (plan.rows, plan.cols)) == (source, resized, canvas, grid)
    assert plan.count == grid[0] * grid[1] + 1


def test_a_386_icon_costs_1088_tokens_and_detail_saves_them():
    costs = {
        detail: image_token_count(plan.rows, plan.cols, 64)
        for detail in ("high", "auto", "low")
        for plan in [plan_tiles(386, 386, size=2048, tile=512, detail=detail)]
    }
    assert costs == {"high": 1088, "auto": 64, "low": 64}


def test_auto_detail_never_costs_more_and_keeps_large_pictures_whole():
    assert plan_tiles(3000, 4000, size=2048, tile=512, detail="auto") == plan_tiles(3000, 4000, size=2048, tile=512)
    assert plan_tiles(600, 800, size=2048, tile=512, detail="auto").resized == (768, 1024)


@pytest.mark.parametrize(
    ("image_size", "patch", "factor", "tokens"), [(512, 16, 4, 64), (384, 14, 3, 81), (364, 14, 2, 169)]
)
def test_tokens_of_a_tile_in_every_family(image_size, patch, factor, tokens):
    assert tokens_per_tile(image_size, patch, factor) == tokens


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 6000))
def test_stage_one_keeps_aspect_within_two_pixels_and_the_cap(height, width, edge):
    h, w = resize_to_longest_edge(height, width, edge)
    target = min(edge, MAX_EDGE)
    # A square with an odd edge: the other side is made even by adding one.
    assert max(h, w) <= target + (edge < MAX_EDGE) and min(h, w) >= 1
    if width >= height and edge <= MAX_EDGE:
        assert w == edge and abs(h - edge * height / width) <= 2
    elif edge <= MAX_EDGE:
        assert h == edge and abs(w - edge * width / height) <= 2


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from([16, 128, 364, 384, 512]))
def test_stage_two_gives_the_smallest_whole_tiles_for_the_long_side(height, width, tile):
    h, w = fit_to_tiles(height, width, tile)
    assert h % tile == w % tile == 0 and h >= tile and w >= tile
    assert max(height, width) <= max(h, w) < max(height, width) + tile


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(64, 4096), st.sampled_from([364, 384, 512]), st.booleans())
def test_tiles_cover_the_canvas_once_row_by_row(height, width, edge, tile, split):
    plan = plan_tiles(height, width, size=edge, tile=tile, split=split)
    boxes = list(tile_boxes(plan))
    assert len(boxes) + 1 == plan.count == tile_count(plan.rows, plan.cols)
    assert boxes == sorted(boxes)
    covered = sum((bottom - top) * (right - left) for top, left, bottom, right in boxes)
    if plan.rows == 0:
        assert plan.canvas == (tile, tile) and plan.cols == covered == 0
    else:
        assert covered == plan.canvas[0] * plan.canvas[1]
        assert plan.rows * plan.cols > 1 and boxes[-1][2:] == plan.canvas


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_a_crop_is_centred_to_the_pixel(height, width, crop_height, crop_width):
    top, left, bottom, right = center_crop_box(height, width, crop_height, crop_width)
    assert (bottom - top, right - left) == (crop_height, crop_width)
    assert 0 <= (height - bottom) - top <= 1 or 0 <= top - (height - bottom) <= 1
    assert abs((width - right) - left) <= 1
    if crop_height <= height:
        assert top >= 0 and bottom <= height
    else:
        assert top <= 0 and bottom >= height


def test_what_cannot_be_is_refused():
    with pytest.raises(ImageError, match="height is 0"):
        plan_tiles(0, 5, size=2048, tile=512)
    with pytest.raises(ImageError, match="Leave do_resize on"):
        plan_tiles(30_000, 30_000, size=None, tile=512)
    with pytest.raises(InputError, match="detail"):
        plan_tiles(5, 5, size=2048, tile=512, detail="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        tile_count(3, 0)
    with pytest.raises(InputError, match="scale factor 3"):
        tokens_per_tile(512, 16, 3)
