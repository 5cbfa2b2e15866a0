"""Our processors where transformers expects its own: a ``ProcessorMixin`` around them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from smolvlm_fms.fms_bridge.loading import resolve_folder
from smolvlm_fms.processing import load_processor
from smolvlm_fms.processing.batch import ProcessedBatch

__all__ = ["FmsProcessor"]


class FmsProcessor(ProcessorMixin):
    """One of this package's processors as a transformers processor.

    Pictures, videos and prompts are ours; ``tokenizer`` is transformers' own for the same folder, because code built on
    transformers (stop strings, data collators) reaches into it.
    """

    attributes: tuple[str, ...] = ()

    def __init__(self, ours: Any, tokenizer: Any) -> None:
        """``ours``: SmolVLMProcessor or LlavaNextProcessor; ``tokenizer``: transformers' tokenizer."""
        self.ours = ours
        self.tokenizer = tokenizer
        self.image_processor = ours.image_processor
        self.video_processor = getattr(ours, "video_processor", None)
        self.chat_template = ours.chat_template

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """From a checkpoint folder or a hub id; ``kwargs`` are options of our processor."""
        options = {name: value for name, value in kwargs.items() if not name.startswith("_") and name != "config"}
        options.pop("trust_remote_code", None)
        options.pop("use_fast", None)
        folder = resolve_folder(pretrained_model_name_or_path, revision=options.pop("revision", None))
        return cls(load_processor(folder, **options), AutoTokenizer.from_pretrained(folder))

    def __getattr__(self, name: str) -> Any:
        if name == "ours":  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.ours, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Our processor's call; the result is transformers' ``BatchFeature``."""
        return _feature(self.ours(*args, **kwargs))

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Our processor's; text, or a ``BatchFeature`` where it tokenizes to a dictionary."""
        return _feature(self.ours.apply_chat_template(conversation, chat_template=chat_template, **kwargs))

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours.post_process_image_text_to_text(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Keys that the model reads."""
        return list(self.ours.model_input_names)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Write our processor's files, which transformers reads."""
        return self.ours.save_pretrained(Path(save_directory))

    def __repr__(self) -> str:
        return f"FmsProcessor({self.ours!r})"


def _feature(result: Any) -> Any:
    return BatchFeature(data=dict(result)) if isinstance(result, ProcessedBatch) else result
