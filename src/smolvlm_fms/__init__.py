"""SmolVLM on IBM's Foundation Model Stack.

    import smolvlm_fms as sv
    vlm = sv.load("demo")
    print(vlm.ask("photo.jpg", "What is this?").text)

Importing this package does no work: names are looked up when they are first used, and FMS is told of our models when
it is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smolvlm_fms.fms_bridge import register_with_fms as _register_with_fms
from smolvlm_fms.startup import collection_paused as _collection_paused

if TYPE_CHECKING:
    from smolvlm_fms.bundle import bundled
    from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
    from smolvlm_fms.config_llava import LlavaNextConfig
    from smolvlm_fms.engine.api import VLM, Stream, load
    from smolvlm_fms.engine.config import EngineConfig
    from smolvlm_fms.engine.options import GenerationOptions
    from smolvlm_fms.errors import (
        CapacityError,
        CheckpointError,
        ConfigurationError,
        DocumentError,
        FetchError,
        ImageError,
        InputError,
        MissingDependencyError,
        PromptError,
        SmolVLMError,
        TokenCountError,
        TrainingError,
        UnsafeCheckpointError,
        VideoError,
    )
    from smolvlm_fms.model.llava_next import LlavaNext
    from smolvlm_fms.model.multi_patch import MultiPatchVisionProcessor, create_multi_patch_processor
    from smolvlm_fms.model.smolvlm import SmolVLM
    from smolvlm_fms.processing.image import SmolVLMImageProcessor
    from smolvlm_fms.processing.llava_image import LlavaNextImageProcessor
    from smolvlm_fms.processing.llava_next import LlavaNextProcessor
    from smolvlm_fms.processing.processor import SmolVLMProcessor
    from smolvlm_fms.processing.video import SmolVLMVideoProcessor
    from smolvlm_fms.types import Answer, TileGrid, Timings, TokenLogprob, Usage

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Answer",
    "CapacityError",
    "CheckpointError",
    "ConfigurationError",
    "DocumentError",
    "EngineConfig",
    "FetchError",
    "GenerationOptions",
    "ImageError",
    "InputError",
    "LlavaNext",
    "LlavaNextConfig",
    "LlavaNextImageProcessor",
    "LlavaNextProcessor",
    "MissingDependencyError",
    "MultiPatchVisionProcessor",
    "PromptError",
    "SmolVLM",
    "SmolVLMConfig",
    "SmolVLMError",
    "SmolVLMImageProcessor",
    "SmolVLMProcessor",
    "SmolVLMVideoProcessor",
    "Stream",
    "TextConfig",
    "TileGrid",
    "Timings",
    "TokenCountError",
    "TokenLogprob",
    "TrainingError",
    "UnsafeCheckpointError",
    "Usage",
    "VideoError",
    "VisionConfig",
    "bundled",
    "create_multi_patch_processor",
    "load",
]

_HOMES = {
    "bundle": "bundled",
    "config": "SmolVLMConfig TextConfig VisionConfig",
    "config_llava": "LlavaNextConfig",
    "engine.api": "VLM Stream load",
    "engine.config": "EngineConfig",
    "engine.options": "GenerationOptions",
    "errors": "CapacityError CheckpointError ConfigurationError DocumentError FetchError ImageError InputError "
    "MissingDependencyError PromptError SmolVLMError TokenCountError TrainingError UnsafeCheckpointError VideoError",
    "model.llava_next": "LlavaNext",
    "model.multi_patch": "MultiPatchVisionProcessor create_multi_patch_processor",
    "model.smolvlm": "SmolVLM",
    "processing.image": "SmolVLMImageProcessor",
    "processing.llava_image": "LlavaNextImageProcessor",
    "processing.llava_next": "LlavaNextProcessor",
    "processing.processor": "SmolVLMProcessor",
    "processing.video": "SmolVLMVideoProcessor",
    "types": "Answer TileGrid Timings TokenLogprob Usage",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _collection_paused():
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# get_model("smolvlm", …) must find our variants after this import; the work is done when somebody imports FMS.
_register_with_fms()
