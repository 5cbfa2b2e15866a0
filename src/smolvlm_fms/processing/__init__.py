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
    from smolvlm_fms.processing.llava_image import LlavaNextImageProcessor
    from smolvlm_fms.processing.llava_next import LlavaNextProcessor
    from smolvlm_fms.processing.processor import SmolVLMProcessor, process_inputs
    from smolvlm_fms.processing.sources import load_image
    from smolvlm_fms.processing.tiling import (
        center_crop,
        cut_into_patches,
        normalize,
        resize_keep_aspect,
        split_into_tiles,
    )
    from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer
    from smolvlm_fms.processing.video import SmolVLMVideoProcessor, VideoMetadata, sample_frame_indices
    from smolvlm_fms.processing.video_decode import decode_video

_HOMES = {
    "LlavaNextImageProcessor": "llava_image",
    "LlavaNextProcessor": "llava_next",
    "ProcessedBatch": "batch",
    "SmolVLMImageProcessor": "image",
    "SmolVLMProcessor": "processor",
    "SmolVLMTokenizer": "tokenizer",
    "SmolVLMVideoProcessor": "video",
    "VideoMetadata": "video",
    "center_crop": "tiling",
    "cut_into_patches": "tiling",
    "decode_video": "video_decode",
    "image_token_count": "geometry",
    "load_image": "sources",
    "load_processor": "factory",
    "normalize": "tiling",
    "plan_tiles": "geometry",
    "preprocess_images": "image",
    "process_inputs": "processor",
    "resize_keep_aspect": "tiling",
    "resize_to_longest_edge": "geometry",
    "sample_frame_indices": "video",
    "split_into_tiles": "tiling",
    "tile_count": "geometry",
    "tokens_per_tile": "geometry",
}

__all__ = [
    "LlavaNextImageProcessor",
    "LlavaNextProcessor",
    "ProcessedBatch",
    "SmolVLMImageProcessor",
    "SmolVLMProcessor",
    "SmolVLMTokenizer",
    "SmolVLMVideoProcessor",
    "VideoMetadata",
    "center_crop",
    "cut_into_patches",
    "decode_video",
    "image_token_count",
    "load_image",
    "load_processor",
    "normalize",
    "plan_tiles",
    "preprocess_images",
    "process_inputs",
    "resize_keep_aspect",
    "resize_to_longest_edge",
    "sample_frame_indices",
    "split_into_tiles",
    "tile_count",
    "tokens_per_tile",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
