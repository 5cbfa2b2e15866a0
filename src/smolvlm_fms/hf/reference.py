"""transformers' own processor for a checkpoint, as far as it can be had here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Idefics3Processor

__all__ = ["reference_processor"]


def reference_processor(folder: Path) -> Any:
    """``AutoProcessor``'s, or without torchvision the picture half of it.

    transformers' ``SmolVLMProcessor`` cannot be built without a video processor, which needs torchvision. Its handling
    of pictures is Idefics3's, which can.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (ImportError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pictures = AutoImageProcessor.from_pretrained(folder)
        template = _template(folder)
        processor = Idefics3Processor(pictures, tokenizer, image_seq_len=_image_seq_len(folder), chat_template=template)
    # Without this field in the checkpoint, transformers 4 makes token_type_ids that the model does not take.
    processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return processor


def _image_seq_len(folder: Path) -> int:
    from smolvlm_fms.config import SmolVLMConfig

    path = folder / "processor_config.json"
    said = json.loads(path.read_text(encoding="utf-8")).get("image_seq_len") if path.exists() else None
    return int(said) if said else SmolVLMConfig.from_hf(folder).tokens_per_tile


def _template(folder: Path) -> str | None:
    """The chat template, from any of the places where releases of transformers have put it."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if template:
                return str(template)
    return None
