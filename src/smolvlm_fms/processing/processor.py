"""``SmolVLMProcessor``: pictures, videos and text in, everything that the model reads out.

    images ─▶ SmolVLMImageProcessor ─▶ pixel_values, rows × cols ─┐
    videos ─▶ SmolVLMVideoProcessor ─▶ pixel_values, times ───────┤
    text   ─▶ <image>, <video> become their prompts ◀─────────────┘ ─▶ tokenizer ─▶ input_ids, attention_mask

For SmolVLM, SmolVLM2, Idefics3 and the Docling models; arguments, keys, shapes, dtypes and values are those of
transformers' processors. Where this one differs on purpose:

* A flat list of pictures is dealt out to several texts by their placeholders (as Idefics3's processor does).
* A batch may mix pictures and videos: each row of pixels is its text's, in the prompt's order. (transformers lets the
  videos' pixels replace the pictures', and gives every video a row of its own.)
* In a ragged batch each video's prompt states its own number of frames (transformers: the longest video's).
* Unknown arguments raise. Counts that do not fit raise and name the row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolvlm_fms.errors import ConfigurationError, InputError, PromptError, TokenCountError, VideoError
from smolvlm_fms.processing import options as image_options
from smolvlm_fms.processing import video as video_options
from smolvlm_fms.processing.batch import ProcessedBatch
from smolvlm_fms.processing.chat import ChatMixin
from smolvlm_fms.processing.chat_template import warn_once
from smolvlm_fms.processing.checkpoint_files import (
    HUB_OPTIONS,
    checkpoint_folder,
    image_seq_len,
    read_chat_template,
    write_chat_template,
)
from smolvlm_fms.processing.files import read_json, write_json
from smolvlm_fms.processing.geometry import tile_count
from smolvlm_fms.processing.image import SmolVLMImageProcessor
from smolvlm_fms.processing.processor_options import CallOptions, route
from smolvlm_fms.processing.prompt import (
    Placeholder,
    PlaceholderTokens,
    check_counts,
    expand_placeholders,
    image_prompt,
    video_prompt,
)
from smolvlm_fms.processing.rows import lay_out_rows, placeholder_kinds
from smolvlm_fms.processing.sources import nest_images
from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer, TokenBatch, as_kind
from smolvlm_fms.processing.video import SmolVLMVideoProcessor, VideoMetadata
from smolvlm_fms.processing.video_layout import nest_videos

__all__ = ["SmolVLMProcessor", "process_inputs"]

# Docling checkpoints write markup in special tokens; without these tokens their answers are empty.
_MARKUP_TOKENS = ("<doctag>", "<otsl>", "<loc_0>")
_TOKENIZER_OPTIONS = ("padding_side", "truncation_side", "model_max_length", "pad_token")
_UNKNOWN_RATE = 24


class SmolVLMProcessor(ChatMixin):
    """Composes tokenizer, picture and video processor.

    image_seq_len: ``<image>`` tokens a tile; chat_template: a template or several by name; family: ``"smolvlm"`` or
    ``"idefics3"`` (which differ in ``mm_token_type_ids`` only); keep_special_tokens: whether answers are decoded with
    their special tokens (found out from the vocabulary when None: True for the Docling checkpoints).
    """

    def __init__(
        self,
        image_processor: SmolVLMImageProcessor | None = None,
        tokenizer: SmolVLMTokenizer | None = None,
        video_processor: SmolVLMVideoProcessor | None = None,
        image_seq_len: int = 169,
        chat_template: str | dict[str, str] | None = None,
        *,
        family: str = "smolvlm",
        keep_special_tokens: bool | None = None,
    ) -> None:
        """
        Raises:
            ConfigurationError: there is no tokenizer, it lacks the picture token, or the family is unknown.
        """
        if tokenizer is None:
            raise ConfigurationError("SmolVLMProcessor needs a tokenizer; SmolVLMTokenizer.from_pretrained(folder).")
        if family not in ("smolvlm", "idefics3"):
            raise ConfigurationError(f"family is {family!r}; it is 'smolvlm' or 'idefics3'.")
        self.image_processor = image_processor or SmolVLMImageProcessor()
        self.tokenizer = tokenizer
        self.video_processor = video_processor
        self.image_seq_len = image_seq_len
        self.chat_template = chat_template if chat_template is not None else tokenizer.chat_template
        self.family = family
        self.tokens = PlaceholderTokens(
            image=getattr(tokenizer, "image_token", "<image>"),
            fake=getattr(tokenizer, "fake_image_token", "<fake_token_around_image>"),
            overview=getattr(tokenizer, "global_image_token", "<global-img>"),
            video=getattr(tokenizer, "video_token", "<video>"),
        )
        vocabulary = tokenizer.backend_tokenizer
        image_token_id = vocabulary.token_to_id(self.tokens.image)
        if image_token_id is None:
            raise ConfigurationError(
                f"The tokenizer has no {self.tokens.image} token; is it the tokenizer of a text model?"
            )
        self.image_token_id: int = image_token_id
        self.end_of_utterance_token: str = getattr(tokenizer, "end_of_utterance_token", "<end_of_utterance>")
        if keep_special_tokens is None:
            keep_special_tokens = any(vocabulary.token_to_id(token) is not None for token in _MARKUP_TOKENS)
        self.keep_special_tokens = keep_special_tokens

    @property
    def image_token(self) -> str:
        return self.tokens.image

    @property
    def fake_image_token(self) -> str:
        return self.tokens.fake

    @property
    def global_image_token(self) -> str:
        return self.tokens.overview

    @property
    def video_token(self) -> str:
        return self.tokens.video

    @property
    def model_input_names(self) -> list[str]:
        """Keys that the model reads."""
        return ["input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"]

    def __repr__(self) -> str:
        return (
            f"SmolVLMProcessor(family={self.family!r}, image_seq_len={self.image_seq_len}, "
            f"image_processor={self.image_processor!r}, video_processor={self.video_processor!r})"
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        image_seq_len: int | None = None,
        **options: Any,
    ) -> ProcessedBatch:
        """Process one text or several, with their pictures and videos.

        Args:
            images: a picture, a list of them, or one list a text (see :class:`SmolVLMImageProcessor`).
            text: one ``<image>`` a picture and one ``<video>`` a video, which become their prompts.
            videos: a video or several (see :class:`SmolVLMVideoProcessor`), dealt out by the placeholders.
            image_seq_len: ``<image>`` tokens a tile, in place of the processor's own.
            options: arguments of the tokenizer (``padding``, ``truncation``, ``return_tensors`` …), of the picture and
                the video processor, flat or in ``text_kwargs``, ``images_kwargs``, ``videos_kwargs``; and
                ``return_mm_token_type_ids``, ``return_text_replacement_offsets``.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T) int64 where there is text; ``pixel_values`` (B, N, C, tile,
            tile) float32 and ``pixel_attention_mask`` (B, N, tile, tile) int64 where there are pictures or videos;
            lists without ``return_tensors``.

        Raises:
            PromptError: placeholders and media do not fit.
            TokenCountError: truncation cut through a picture's tokens.
            ImageError, VideoError, FetchError, ConfigurationError: from the parts.
        """
        texts = _texts(text)
        chosen = route(options)
        nested = self._nested_images(images, texts)
        flat_videos = None if _is_empty(videos) else nest_videos(videos)
        if texts is None and nested is None and flat_videos is None:
            raise InputError("Nothing to process: pass text, images or videos.")
        if texts is None and nested is not None and flat_videos is not None:
            raise InputError("Pictures and videos together need a text that says where each belongs.")
        if texts is not None:
            check_counts(
                texts,
                None if nested is None else [len(sample) for sample in nested],
                None if flat_videos is None else len(flat_videos),
                self.tokens,
            )
        length = self.image_seq_len if image_seq_len is None else image_seq_len
        pictures, grids = self._pictures(nested, chosen)
        clips, metadata = self._videos(flat_videos, chosen)
        data: dict[str, Any] = {}
        if texts is not None:
            image_prompts = [image_prompt(rows, cols, length, self.tokens) for rows, cols in grids]
            video_prompts = [_video_prompt(one, length, self.tokens) for one in metadata]
            data |= self._encode(texts, image_prompts, video_prompts, chosen)
            kinds = [placeholder_kinds(text, self.tokens) for text in texts]
            if clips and any(row != ["video"] for row in kinds):
                tiles = [tile_count(rows, cols) for rows, cols in grids]
                frames = [len(one.timestamps) for one in metadata]
                pictures, clips = lay_out_rows(kinds, pictures, tiles, clips, frames, chosen.return_tensors), {}
        data |= {**(pictures or {}), **clips}
        if metadata and chosen.return_metadata:
            data["video_metadata"] = metadata
        return ProcessedBatch(data)

    def create_batch(self, samples: Sequence[Mapping[str, Any]], **options: Any) -> ProcessedBatch:
        """Samples ``{"text": …, "images": […], "videos": […]}`` to one padded batch of tensors.

        Text without placeholders gets its pictures and videos in front. ``options`` are those of a call; ``padding``
        is True and ``return_tensors`` ``"pt"`` unless they say otherwise.
        """
        texts, pictures, clips = [], [], []
        for row, sample in enumerate(samples):
            unknown = set(sample) - {"text", "images", "videos"}
            if unknown or not isinstance(sample.get("text"), str):
                raise InputError(
                    f"Sample {row} holds {sorted(sample)}; it must hold 'text' and may hold 'images', 'videos'."
                )
            own = [] if _is_empty(sample.get("images")) else nest_images(sample["images"])
            own_pictures = [picture for nest in own for picture in nest]
            own_clips = [] if _is_empty(sample.get("videos")) else nest_videos(sample["videos"])
            texts.append(self._with_placeholders(sample["text"], len(own_pictures), len(own_clips)))
            pictures.append(own_pictures)
            clips += own_clips
        call: dict[str, Any] = {"padding": True, "return_tensors": "pt"} | options
        return self(images=pictures, text=texts, videos=clips, **call)

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Text of one row of ids; the tokenizer's ``decode``."""
        return self.tokenizer.decode(token_ids, **options)

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """Texts of several rows of ids; the tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(sequences, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool | None = None, **options: Any
    ) -> list[str]:
        """Answers as text. Special tokens are left out, except for Docling checkpoints (``keep_special_tokens``), whose
        answers lose only the end of the turn and padding."""
        if skip_special_tokens is None and self.keep_special_tokens:
            ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
            ends.add(self.tokenizer.backend_tokenizer.token_to_id(self.end_of_utterance_token))
            rows = generated_outputs.tolist() if hasattr(generated_outputs, "tolist") else generated_outputs
            rows = rows if rows and isinstance(rows[0], list | tuple) else [rows]
            generated_outputs = [[int(token) for token in row if int(token) not in ends] for row in rows]
            skip_special_tokens = False
        skip = True if skip_special_tokens is None else skip_special_tokens
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> SmolVLMProcessor:
        """From a checkpoint's folder or a hub id (``"HuggingFaceTB/SmolVLM2-256M-Video-Instruct"``).

        options: ``cache_dir``, ``revision``, ``token``, ``local_files_only``, ``force_download`` for the hub; and any
        option of the picture and video processor, ``padding_side``, ``image_seq_len``, ``chat_template`` … in place of
        what the files say.

        Raises:
            FetchError: no such folder or model, or a file is missing.
            ConfigurationError: a file cannot be read, or an option does not exist.
        """
        hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        for ignored in ("use_fast", "trust_remote_code"):
            options.pop(ignored, None)
        folder = checkpoint_folder(name, **hub)
        written = read_json(folder / "processor_config.json", missing_ok=True)
        tokenizer = SmolVLMTokenizer.from_pretrained(folder, **_pick(options, _TOKENIZER_OPTIONS))
        images = SmolVLMImageProcessor.from_pretrained(folder, **_pick(options, image_options.DEFAULTS))
        family = _family(folder, written, tokenizer)
        clips = None
        if family == "smolvlm":
            shared = {name: value for name, value in options.items() if name != "backend"}  # the pictures' alone
            clips = SmolVLMVideoProcessor.from_pretrained(folder, **_pick(shared, video_options.DEFAULTS))
        own = _pick(options, ("image_seq_len", "chat_template", "keep_special_tokens", "family"))
        known = (*_TOKENIZER_OPTIONS, *image_options.DEFAULTS, *video_options.DEFAULTS, *own)
        if unknown := [option for option in options if option not in known]:
            raise ConfigurationError(f"from_pretrained has no option {unknown[0]!r}.")
        settings: dict[str, Any] = {
            "image_seq_len": own["image_seq_len"] if "image_seq_len" in own else image_seq_len(folder, written),
            "chat_template": read_chat_template(folder, written),
            "family": family,
        }
        return cls(images, tokenizer, clips, **(settings | own))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write tokenizer, processors and chat template in the layout that transformers 4.57 and 5 read."""
        folder = Path(folder)
        name = "SmolVLMProcessor" if self.family == "smolvlm" else "Idefics3Processor"
        write_json(folder / "processor_config.json", {"image_seq_len": self.image_seq_len, "processor_class": name})
        self.tokenizer.configuration["processor_class"] = name
        self.tokenizer.save_pretrained(folder)
        written = [str(folder / "processor_config.json"), *self.image_processor.save_pretrained(folder)]
        if self.video_processor is not None:
            written += self.video_processor.save_pretrained(folder)
        return written + [str(file) for file in write_chat_template(folder, self.chat_template)]

    def _nested_images(self, images: Any, texts: list[str] | None) -> list[list[Any]] | None:
        """One list of pictures a text; a flat list is dealt out by the texts' placeholders."""
        if _is_empty(images):
            return None
        nested = nest_images(images)
        is_flat = not isinstance(images, list | tuple) or not any(isinstance(item, list | tuple) for item in images)
        if texts is None or len(texts) == len(nested) or not is_flat or len(nested) != 1:
            return nested
        waiting = nested[0]
        dealt: list[list[Any]] = []
        for text in texts:
            count = text.count(self.tokens.image)
            dealt.append(waiting[:count])
            waiting = waiting[count:]
        dealt[-1] += waiting
        return dealt

    def _pictures(
        self, nested: list[list[Any]] | None, chosen: CallOptions
    ) -> tuple[dict[str, Any] | None, list[tuple[int, int]]]:
        """The picture processor's batch, and (rows, cols) of every picture."""
        if nested is None:
            return None, []
        batch = dict(self.image_processor(nested, **(chosen.images | {"return_row_col_info": True})))
        rows, cols = batch.pop("rows"), batch.pop("cols")
        return batch, [grid for pair in zip(rows, cols, strict=True) for grid in zip(*pair, strict=True)]

    def _videos(
        self, videos: list[Any] | None, chosen: CallOptions
    ) -> tuple[dict[str, Any], list[VideoMetadata]]:  # fmt: skip
        if videos is None:
            return {}, []
        if self.video_processor is None:
            raise VideoError("This checkpoint was not trained on videos; use a SmolVLM2 checkpoint, or pass frames.")
        batch = dict(self.video_processor(videos, **(chosen.videos | {"return_metadata": True})))
        return batch, batch.pop("video_metadata")

    def _encode(
        self, texts: list[str], image_prompts: list[str], video_prompts: list[str], chosen: CallOptions
    ) -> dict[str, Any]:
        """Token ids of the texts with their placeholders expanded, and what else was asked for."""
        expanded, placeholders = expand_placeholders(texts, image_prompts, video_prompts, self.tokens)
        encoded = self.tokenizer(expanded, **chosen.text)
        ids = [encoding.ids for encoding in encoded.encodings]
        for row, (text, row_ids) in enumerate(zip(expanded, ids, strict=False)):
            kept, written = row_ids.count(self.image_token_id), text.count(self.tokens.image)
            if kept != written:
                raise TokenCountError(
                    f"Text {row} holds {written} {self.tokens.image} tokens, but {kept} are left after truncation to "
                    f"{len(row_ids)} tokens. A picture cannot be cut: raise max_length, shorten the text, or lower the "
                    f"pictures' size."
                )
        data: dict[str, Any] = dict(encoded)
        if chosen.return_text_replacement_offsets:
            data["text_replacement_offsets"] = [[found.as_dict() for found in row] for row in placeholders]
        if chosen.return_mm_token_type_ids:
            kinds = self._token_types(encoded, ids, placeholders)
            data["mm_token_type_ids"] = as_kind("mm_token_type_ids", kinds, chosen.return_tensors)
        return data

    def _token_types(
        self, encoded: TokenBatch, ids: list[list[int]], placeholders: list[list[Placeholder]]
    ) -> list[list[int]]:
        """1 for tokens of pictures, else 0: the ``<image>`` tokens (SmolVLM) or the whole expansion (Idefics3)."""
        if self.family == "smolvlm":
            return [[int(token == self.image_token_id) for token in row] for row in ids]
        kinds = [[0] * len(row) for row in ids]
        for row, found in zip(range(len(ids)), placeholders, strict=False):
            for one in found:
                first = encoded.encodings[row].char_to_token(one.new_span[0])
                last = encoded.encodings[row].char_to_token(one.new_span[1] - 1)
                first, last = first or 0, len(kinds[row]) - 1 if last is None else last
                kinds[row][first : last + 1] = [1] * (last + 1 - first)
        return kinds

    def _with_placeholders(self, text: str, pictures: int, clips: int) -> str:
        """The text, with placeholders put in front where it has none."""
        if self.tokens.image not in text and self.tokens.video not in text:
            return self.tokens.image * pictures + self.tokens.video * clips + text
        return text


def process_inputs(
    processor: SmolVLMProcessor, images: Any = None, text: str | Sequence[str] = "", **options: Any
) -> ProcessedBatch:
    """One call from pictures and text to the whole dictionary: ``input_ids``, ``attention_mask``, ``pixel_values``,
    ``pixel_attention_mask``, as tensors.

    Text without ``<image>`` is a question: it becomes a user's turn with the pictures in front, by the checkpoint's
    chat template, ready to be answered. Text with ``<image>`` is taken as it is. Several texts go with one list of
    pictures each.
    """
    texts = [text] if isinstance(text, str) else list(text)
    nested = [[] for _ in texts] if _is_empty(images) else nest_images(images)
    if len(nested) != len(texts):
        raise PromptError(f"{len(texts)} text(s) came with pictures for {len(nested)}; pass one list a text.")
    prompts = []
    for question, pictures in zip(texts, nested, strict=True):
        if processor.image_token not in question:
            parts = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
            question = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        prompts.append(question)
    call: dict[str, Any] = {"padding": True, "return_tensors": "pt"} | options
    return processor(images=nested if any(nested) else None, text=prompts, **call)


def _video_prompt(metadata: VideoMetadata, length: int, tokens: PlaceholderTokens) -> str:
    if metadata.fps is None:
        warn_once(
            f"A video's frame rate is unknown, so the times in its prompt assume {_UNKNOWN_RATE} frames a second. "
            "Pass video_metadata with the true fps."
        )
        metadata.fps = _UNKNOWN_RATE
    stamps = metadata.timestamps
    return video_prompt(stamps, metadata.duration, len(stamps), length, tokens)


def _texts(text: Any) -> list[str] | None:
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else [text]
    for row, one in enumerate(texts):
        if not isinstance(one, str):
            raise PromptError(f"Text {row} must be a string, got {type(one).__name__}.")
    if not texts:
        raise PromptError("The list of texts is empty.")
    return texts


def _is_empty(media: Any) -> bool:
    """None, an empty list, or lists that are all empty: nothing was passed."""
    return media is None or (isinstance(media, list | tuple) and all(_is_empty(item) for item in media))


def _pick(options: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _family(folder: Path, written: Mapping[str, Any], tokenizer: SmolVLMTokenizer) -> str:
    """The processor that the folder names; it decides about videos and token types."""
    preprocessor = read_json(folder / "preprocessor_config.json", missing_ok=True)
    named = [
        written.get("processor_class"),
        tokenizer.configuration.get("processor_class"),
        preprocessor.get("processor_class"),
        read_json(folder / "config.json", missing_ok=True).get("model_type"),
    ]
    first = next((str(name).lower() for name in named if name), "smolvlm")
    return "idefics3" if first.startswith("idefics3") else "smolvlm"
