"""How a picture is cut, as a person wants to see it: numbers, and the grid drawn on the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from smolvlm_fms.config import SmolVLMConfig, VisionConfig
from smolvlm_fms.errors import FetchError
from smolvlm_fms.processing.geometry import image_token_count, tile_boxes
from smolvlm_fms.processing.image import SmolVLMImageProcessor
from smolvlm_fms.processing.pixels import to_picture
from smolvlm_fms.processing.prompt import image_prompt
from smolvlm_fms.processing.sources import load_image
from smolvlm_fms.types import TileGrid

__all__ = ["draw_grid", "inspect_picture", "tower_flop"]


def inspect_picture(image: Any, folder: Path, *, detail: str = "high", save: Path | None = None) -> dict[str, Any]:
    """Report how the checkpoint in ``folder`` has ``image`` cut; ``save`` gets the picture with its grid drawn on it.

    Returns ``size`` and ``resized`` [w, h], ``tiles`` {rows, cols, count}, ``tile_size``, ``tokens_per_tile``,
    ``image_tokens``, ``prompt`` (the text that stands for the picture) and ``gflop`` of the vision tower.
    """
    config = SmolVLMConfig.from_hf(folder)
    processor = SmolVLMImageProcessor.from_pretrained(folder)
    picture = to_picture(load_image(image))
    height, width = picture.size
    grid = processor.plan(height, width, detail=detail)
    if save is not None:
        _save(draw_grid(load_image(image), grid), save)
    return {
        "size": [width, height],
        "resized": [grid.canvas[1], grid.canvas[0]],
        "tiles": {"rows": grid.rows, "cols": grid.cols, "count": grid.count},
        "tile_size": grid.tile,
        "tokens_per_tile": config.tokens_per_tile,
        "image_tokens": image_token_count(grid.rows, grid.cols, config.tokens_per_tile),
        "prompt": image_prompt(grid.rows, grid.cols, config.tokens_per_tile),
        "gflop": round(grid.count * tower_flop(config.vision) / 1e9, 1),
    }


def draw_grid(image: Any, grid: TileGrid) -> Image.Image:
    """The picture as it is resized for cutting, with every tile's border and its place (row, column) drawn on it."""
    pillow = image if isinstance(image, Image.Image) else Image.fromarray(image)
    canvas = pillow.convert("RGB").resize((grid.canvas[1], grid.canvas[0]), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    line = max(2, max(canvas.size) // 400)
    boxes = list(tile_boxes(grid)) or [(0, 0, *grid.canvas)]
    for index, (top, left, bottom, right) in enumerate(boxes):
        # Dark under light, so that the lines show on any picture.
        for colour, thickness in (("black", 2 * line), ("#ffd000", line)):
            draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=thickness)
        label = f"{index // grid.cols + 1},{index % grid.cols + 1}" if grid.cols else "overview"
        place, size = (left + 3 * line, top + 2 * line), max(14, grid.tile // 10)
        draw.text(place, label, fill="#ffd000", font_size=size, stroke_width=line, stroke_fill="black")
    return canvas


def tower_flop(config: VisionConfig) -> float:
    """Floating-point operations of the tower on one tile: two a multiply-add, linears and attention products."""
    patches, width = config.patches_per_side**2, config.hidden_size
    linears = 2 * patches * width * (4 * width + 2 * config.intermediate_size)
    attention = 4 * patches * patches * width
    embedding = 2 * patches * width * config.num_channels * config.patch_size**2
    return config.num_hidden_layers * (linears + attention) + embedding


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise FetchError(f"The picture could not be written to {path}: {error}") from error
