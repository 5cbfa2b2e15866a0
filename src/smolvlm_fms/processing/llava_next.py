"""``LlavaNextProcessor``: pictures and text in, everything that LLaVA-Next reads out.

    images ─▶ LlavaNextImageProcessor ─▶ pixel_values, image_sizes ─┐
    text   ─▶ each <image> becomes as many as the picture has tokens ┴─▶ tokenizer ─▶ input_ids, attention_mask

For granite-vision and LLaVA-1.6; arguments, keys, shapes, dtypes and values are those of transformers' class of this
name, except that unknown arguments raise, and counts that do not fit name the row where the pictures are nested.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolvlm_fms.config_llava import AnyResolution, LlavaNextConfig
from smolvlm_fms.errors import ConfigurationError, InputError, PromptError
from smolvlm_fms.processing import llava_image
from smolvlm_fms.processing.batch import ProcessedBatch
from smolvlm_fms.processing.chat import ChatMixin
from smolvlm_fms.processing.checkpoint_files import (
    HUB_OPTIONS,
    checkpoint_folder,
    read_chat_template,
    write_chat_template,
)
from smolvlm_fms.processing.files import read_json, write_json
from smolvlm_fms.processing.llava_image import LlavaNextImageProcessor
from smolvlm_fms.processing.options import CALL_ONLY
from smolvlm_fms.processing.processor_options import NAMES, CallOptions, route
from smolvlm_fms.processing.prompt import PlaceholderTokens, expand_placeholders
from smolvlm_fms.processing.sources import nest_images
from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer, as_kind

__all__ = ["LlavaNextProcessor"]

_TOKENIZER_OPTIONS = ("padding_side", "truncation_side", "model_max_length", "pad_token")
_OWN = ("patch_size", "vision_feature_select_strategy", "image_token", "num_additional_image_tokens")
_NAMES = {
    "text_kwargs": NAMES["text_kwargs"],
    "images_kwargs": frozenset([*llava_image.DEFAULTS, *CALL_ONLY]),
    "videos_kwargs": frozenset[str](),
}
_STRATEGIES = ("default", "full")


class LlavaNextProcessor(ChatMixin):
    """Composes tokenizer and picture processor.

    patch_size: pixels along a side of the tower's patches. vision_feature_select_strategy: ``"default"`` drops the
    tower's class token, ``"full"`` keeps what there is; num_additional_image_tokens: how many tokens beside its patches
    the tower has (CLIP 1, SigLIP 0). All three as the model has them; ``from_pretrained`` finds them out.
    """

    video_processor = None
    keep_special_tokens = False

    def __init__(
        self,
        image_processor: LlavaNextImageProcessor | None = None,
        tokenizer: SmolVLMTokenizer | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
    ) -> None:
        """
        Raises:
            ConfigurationError: there is no tokenizer, it lacks the picture token, or an argument cannot be used.
        """
        if tokenizer is None:
            raise ConfigurationError("LlavaNextProcessor needs a tokenizer; SmolVLMTokenizer.from_pretrained(folder).")
        if vision_feature_select_strategy not in (None, *_STRATEGIES):
            raise ConfigurationError(
                f"vision_feature_select_strategy is {vision_feature_select_strategy!r}; it is 'default' or 'full'."
            )
        self.image_processor = image_processor or LlavaNextImageProcessor()
        self.tokenizer = tokenizer
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.chat_template = chat_template if chat_template is not None else tokenizer.chat_template
        self.image_token: str = getattr(tokenizer, "image_token", None) or image_token
        found = tokenizer.backend_tokenizer.token_to_id(self.image_token)
        if found is None:
            raise ConfigurationError(
                f"The tokenizer has no {self.image_token} token; is it the tokenizer of a text model?"
            )
        self.image_token_id: int = found
        self.tokens = PlaceholderTokens(image=self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        """Keys that the model reads."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={getattr(self, name)!r}" for name in _OWN)
        return f"LlavaNextProcessor({own}, image_processor={self.image_processor!r})"

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, videos: Any = None, **options: Any
    ) -> ProcessedBatch:
        """Process one text or several, with their pictures.

        Args:
            images: a picture, a list of them in the order of their placeholders, or one list a text.
            text: one ``<image>`` a picture, which becomes as many as the picture has tokens.
            videos: only there to be refused.
            options: arguments of the tokenizer (``padding``, ``truncation``, ``return_tensors`` …) and of the picture
                processor, flat or in ``text_kwargs``, ``images_kwargs``; and ``return_mm_token_type_ids``,
                ``return_text_replacement_offsets``.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T) int64 where there is text; ``pixel_values`` (M, N, C, tile,
            tile) float32 and ``image_sizes`` (M, 2) int64 where there are pictures; lists without ``return_tensors``.

        Raises:
            PromptError: placeholders and pictures do not fit, or truncation cut through a picture's tokens.
            ImageError, FetchError, ConfigurationError: from the parts.
        """
        if not _is_empty(videos):
            raise InputError("LLaVA-Next takes pictures and text; a video came.")
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        if texts is not None and not (texts and all(isinstance(one, str) for one in texts)):
            raise PromptError("text must be a string, or a list of strings that is not empty.")
        chosen = route(options, _NAMES)
        nested = None if _is_empty(images) else nest_images(images)
        if texts is None and nested is None:
            raise InputError("Nothing to process: pass text or images.")
        if texts is not None:
            self._check_counts(texts, nested)
        pictures: dict[str, Any] = {}
        if nested is not None:
            pictures = dict(self.image_processor(nested, **chosen.images))
        data: dict[str, Any] = {}
        if texts is not None:
            prompts = self._prompts(pictures, chosen) if pictures else []
            data |= self._encode(texts, prompts, chosen)
        return ProcessedBatch(data | pictures)

    def num_image_tokens(self, size: tuple[int, int], tile: tuple[int, int], image_grid_pinpoints: Any = None) -> int:
        """``<image>`` tokens of a picture of ``size`` (height, width) that is cut into tiles of ``tile`` pixels.

        Raises ConfigurationError where patch_size is not known or tiles are not square.
        """
        if not self.patch_size:
            raise ConfigurationError(
                "patch_size is not known, so image tokens cannot be counted; pass patch_size= (14 for CLIP-L and "
                "SO400M) or load the processor from a folder with a config.json."
            )
        height, width = tile
        if height != width:
            raise ConfigurationError(f"Tiles are {height} × {width} pixels; LLaVA-Next's are square.")
        pinpoints = image_grid_pinpoints or self.image_processor.image_grid_pinpoints
        geometry = AnyResolution(tuple((h, w) for h, w in pinpoints), height, height // self.patch_size)
        dropped = int(self.vision_feature_select_strategy == "default")
        return geometry.num_tokens(size) + self.num_additional_image_tokens - dropped

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Text of one row of ids; the tokenizer's ``decode``."""
        return self.tokenizer.decode(token_ids, **options)

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """Texts of several rows of ids; the tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(sequences, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """Answers as text, without special tokens unless asked for."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> LlavaNextProcessor:
        """From a checkpoint's folder or a hub id.

        What ``processor_config.json`` leaves out of patch_size, vision_feature_select_strategy and
        num_additional_image_tokens is taken from the model's ``config.json``. options: of the picture processor, the
        tokenizer (``padding_side`` …), the constructor and the hub (``revision``, ``cache_dir`` …).

        Raises FetchError where files are missing, ConfigurationError where one cannot be used.
        """
        folder = checkpoint_folder(name, **{key: options.pop(key) for key in HUB_OPTIONS if key in options})
        known = (*_TOKENIZER_OPTIONS, *llava_image.DEFAULTS, *_OWN, "chat_template")
        if unknown := [option for option in options if option not in known]:
            raise ConfigurationError(f"from_pretrained has no option {unknown[0]!r}; known: {', '.join(known)}.")
        written = read_json(folder / "processor_config.json", missing_ok=True)
        settings = {key: written[key] for key in _OWN if written.get(key) is not None}
        if (folder / "config.json").is_file():
            settings = _of_model(LlavaNextConfig.from_hf(folder)) | settings
        settings["chat_template"] = read_chat_template(folder, written)
        settings |= {key: options[key] for key in (*_OWN, "chat_template") if key in options}
        images = {key: options[key] for key in llava_image.DEFAULTS if key in options}
        words = {key: options[key] for key in _TOKENIZER_OPTIONS if key in options}
        return cls(
            LlavaNextImageProcessor.from_pretrained(folder, **images),
            SmolVLMTokenizer.from_pretrained(folder, **words),
            **settings,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write tokenizer, processors and chat template in the layout that transformers 4.57 and 5 read."""
        folder, name = Path(folder), "LlavaNextProcessor"
        own = {key: getattr(self, key) for key in _OWN}
        write_json(folder / "processor_config.json", {**own, "processor_class": name})
        self.tokenizer.configuration["processor_class"] = name
        self.tokenizer.save_pretrained(folder)
        written = [str(folder / "processor_config.json"), *self.image_processor.save_pretrained(folder)]
        return written + [str(file) for file in write_chat_template(folder, self.chat_template)]

    def _template(self, asked: str | None, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> str:
        for conversation in conversations:
            for message in conversation:
                content = message.get("content")
                if isinstance(content, list) and any(part["type"] == "video" for part in content):
                    raise PromptError("LLaVA-Next takes pictures and text; a part of type 'video' came.")
        return super()._template(asked, conversations)

    def _check_counts(self, texts: list[str], nested: list[list[Any]] | None) -> None:
        """Placeholders against pictures: row by row where pictures are nested so, else in all."""
        wanted = [text.count(self.image_token) for text in texts]
        if nested is None:
            if any(wanted):
                raise PromptError(
                    f"The text holds {sum(wanted)} {self.image_token} placeholder(s) but no picture was passed. "
                    "Pass images=, or take the placeholder out of the text."
                )
            return
        passed = [len(sample) for sample in nested]
        if sum(wanted) != sum(passed):
            where = [f"row {i}: {w} and {p}" for i, (w, p) in enumerate(zip(wanted, passed, strict=False)) if w != p]
            rows = f" ({'; '.join(where[:3])})" if len(wanted) == len(passed) > 1 else ""
            raise PromptError(
                f"The texts hold {sum(wanted)} {self.image_token} placeholder(s) but {sum(passed)} picture(s) were "
                f"passed{rows}. Write one {self.image_token} per picture; a user's own words must not contain it."
            )

    def _prompts(self, pictures: Mapping[str, Any], chosen: CallOptions) -> list[str]:
        height, width = pictures["pixel_values"][0].shape[-2:]
        pinpoints = chosen.images.get("image_grid_pinpoints")
        sizes = [(int(h), int(w)) for h, w in pictures["image_sizes"]]
        return [self.image_token * self.num_image_tokens(size, (height, width), pinpoints) for size in sizes]

    def _encode(self, texts: list[str], prompts: list[str], chosen: CallOptions) -> dict[str, Any]:
        """Token ids of the texts with their placeholders expanded, and what else was asked for."""
        expanded, placeholders = expand_placeholders(texts, prompts, (), self.tokens)
        encoded = self.tokenizer(expanded, **chosen.text)
        ids = [encoding.ids for encoding in encoded.encodings]
        for row, (text, row_ids) in enumerate(zip(expanded, ids, strict=False)):
            kept, written = row_ids.count(self.image_token_id), text.count(self.image_token)
            if kept != written:
                raise PromptError(
                    f"Text {row} holds {written} {self.image_token} tokens, but {kept} are left after truncation to "
                    f"{len(row_ids)} tokens. A picture cannot be cut: raise max_length or shorten the text."
                )
        data: dict[str, Any] = dict(encoded)
        if chosen.return_text_replacement_offsets:
            data["text_replacement_offsets"] = [[found.as_dict() for found in row] for row in placeholders]
        if chosen.return_mm_token_type_ids:
            kinds = [[int(token == self.image_token_id) for token in row] for row in ids]
            data["mm_token_type_ids"] = as_kind("mm_token_type_ids", kinds, chosen.return_tensors)
        return data


def _of_model(config: LlavaNextConfig) -> dict[str, Any]:
    return {
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(config.vision.has_class_token),
    }


def _is_empty(media: Any) -> bool:
    return media is None or (isinstance(media, list | tuple) and all(_is_empty(item) for item in media))
