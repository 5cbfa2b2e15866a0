"""The processor that belongs to a checkpoint, whatever its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smolvlm_fms.config import read_json_config

__all__ = ["load_processor"]


def load_processor(folder: str | Path, **options: Any) -> Any:
    """Return the processor for the checkpoint in ``folder``: SmolVLMProcessor or LlavaNextProcessor.

    ``options`` are those of its ``from_pretrained``. Raises ConfigurationError or FetchError.
    """
    if read_json_config(folder).get("model_type") == "llava_next":
        from smolvlm_fms.processing.llava_next import LlavaNextProcessor

        return LlavaNextProcessor.from_pretrained(folder, **options)
    from smolvlm_fms.processing.processor import SmolVLMProcessor

    return SmolVLMProcessor.from_pretrained(folder, **options)
