"""Pictures, videos and text to what the model reads. Names load on first use: prompts alone need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolvlm_fms.processing.batch import ProcessedBatch
    from smolvlm_fms.processing.factory import load_processor
    from smolvlm_fms.processing.geometry import (
        image_token_count,
        plan_tiles,
        resize_to_longest_edge,
        tile_count,
        tokens_per_tile,
    )
    from smolvlm_fms.processing.image import SmolVLMImageProcessor, preprocess_images
    from smolvlm_fms.processing.sources import load_image
    from smolvlm_fms.processing.tiling import (
        center_crop,
        cut_into_patches,
        normalize,
        resize_keep_aspect,
        split_into_tiles,
    )

_HOMES = {
    "ProcessedBatch": "batch",
    "SmolVLMImageProcessor": "image",
    "center_crop": "tiling",
    "cut_into_patches": "tiling",
    "image_token_count": "geometry",
    "load_image": "sources",
    "load_processor": "factory",
    "normalize": "tiling",
    "plan_tiles": "geometry",
    "preprocess_images": "image",
    "resize_keep_aspect": "tiling",
    "resize_to_longest_edge": "geometry",
    "split_into_tiles": "tiling",
    "tile_count": "geometry",
    "tokens_per_tile": "geometry",
}

__all__ = [
    "ProcessedBatch",
    "SmolVLMImageProcessor",
    "center_crop",
    "cut_into_patches",
    "image_token_count",
    "load_image",
    "load_processor",
    "normalize",
    "plan_tiles",
    "preprocess_images",
    "resize_keep_aspect",
    "resize_to_longest_edge",
    "split_into_tiles",
    "tile_count",
    "tokens_per_tile",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
