"""Conversations for ``SmolVLMProcessor``: the chat format that transformers and OpenAI's clients use.

    [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What is this?"}]}]

A picture part names its picture under ``image``, ``url``, ``path`` or ``base64``, a video part under ``video``, ``url``
or ``path``; OpenAI's ``image_url`` parts are understood, too. A video that is a list of frames may say under ``fps``
how many of them make a second, from which come the times in its prompt (transformers passes over that key).
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smolvlm_fms.errors import PromptError
from smolvlm_fms.processing.chat_template import (
    VIDEO_TEMPLATE,
    Span,
    normalise_conversations,
    render_chat,
    template_variables,
)
from smolvlm_fms.processing.tokenizer import as_kind

if TYPE_CHECKING:
    from smolvlm_fms.processing.batch import ProcessedBatch
    from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer
    from smolvlm_fms.processing.video import SmolVLMVideoProcessor

__all__ = ["ChatMixin", "media_of", "metadata_of"]

_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}


class ChatMixin:
    """``apply_chat_template``, for a processor with a tokenizer, a template and perhaps a video processor."""

    tokenizer: SmolVLMTokenizer
    video_processor: SmolVLMVideoProcessor | None
    chat_template: str | dict[str, str] | None

    def __call__(self, **_: Any) -> ProcessedBatch:
        raise NotImplementedError

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation (or several) as text, or with ``tokenize=True`` as what the model reads.

        Args:
            conversation: messages, or a list of such lists.
            chat_template: a template, or the name of one of the checkpoint's; by default the checkpoint's own, and for
                conversations with videos SmolVLM2's video template.
            add_generation_prompt: end with the header of an assistant's turn.
            continue_final_message: end inside the last message, which the model is to go on with.
            return_assistant_tokens_mask: also ``assistant_masks``, 1 for tokens inside ``{% generation %}`` blocks.
            tokenize, return_dict: load pictures and videos and return the whole dictionary; without ``return_dict``
                the ``input_ids`` alone.
            processor_kwargs: arguments for the processor's call (``padding``, ``num_frames``, ``fps``,
                ``do_sample_frames``, ``do_image_splitting`` …); they may come flat as well.
            kwargs: variables for the template, and further arguments for the call.

        Videos in files are sampled by the checkpoint's ``fps`` and ``num_frames`` unless ``do_sample_frames`` says
        otherwise; frames that are already decoded are taken as they are unless sampling is asked for.

        Raises PromptError where messages, template and media do not fit together, and what a call raises.
        """
        if load_audio_from_video:
            raise PromptError("SmolVLM does not hear: load_audio_from_video cannot be used.")
        conversations, is_batched = normalise_conversations(conversation)
        template = self._template(chat_template, conversations)
        _check_parts(conversations, template)
        variables = template_variables(template)
        options = dict(processor_kwargs or {}) | {key: value for key, value in kwargs.items() if key not in variables}
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise PromptError(
                "continue_final_message goes with neither add_generation_prompt nor return_assistant_tokens_mask."
            )
        texts, spans = render_chat(
            conversations,
            template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            mark_generation=return_assistant_tokens_mask,
            tools=tools,
            documents=documents,
            **{**self.tokenizer.special_tokens_map, **{key: kwargs[key] for key in kwargs if key in variables}},
        )
        if not tokenize:
            return texts if is_batched else texts[0]
        options = self._call_options(options, texts[0], return_tensors, return_assistant_tokens_mask)
        pictures, videos = media_of(conversations)
        if "images" in options:
            given = options.pop("images")
            pictures = given if is_batched else [list(given) if isinstance(given, list | tuple) else [given]]
        self._choose_sampling(options, videos)
        known = [one for row in metadata_of(conversations) for one in row]
        if any(known) and "video_metadata" not in options | dict(options.get("videos_kwargs") or {}):
            options["video_metadata"] = known
        batch = self(text=texts, images=pictures, videos=videos, **options)
        if return_assistant_tokens_mask:
            offsets, replaced = batch.pop("offset_mapping"), batch.pop("text_replacement_offsets")
            masks = [
                _assistant_mask(row_offsets, row_replaced, row_spans)
                for row_offsets, row_replaced, row_spans in zip(offsets, replaced, spans, strict=True)
            ]
            batch["assistant_masks"] = as_kind("assistant_masks", masks, options.get("return_tensors"))
        return batch if return_dict else batch["input_ids"]

    def _template(self, asked: str | None, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> str:
        known = self.chat_template
        if asked is not None:
            return known[asked] if isinstance(known, dict) and asked in known else asked
        if any(part["type"] == "video" for message in _messages(conversations) for part in _parts(message)):
            return VIDEO_TEMPLATE
        if isinstance(known, dict):
            if "default" not in known:
                raise PromptError(f"Several chat templates and no default; pass chat_template, one of {sorted(known)}.")
            return known["default"]
        if not known:
            raise PromptError("This checkpoint has no chat template; pass chat_template, or the prompt as text.")
        return known

    def _call_options(
        self, options: dict[str, Any], first: str, return_tensors: str | None, assistant: bool
    ) -> dict[str, Any]:
        bos = self.tokenizer.bos_token
        if bos is not None and first.startswith(bos):
            options["add_special_tokens"] = False  # the template has written it already
        if return_tensors is not None:
            options["return_tensors"] = getattr(return_tensors, "value", return_tensors)
        if assistant:
            options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        return options

    def _choose_sampling(self, options: dict[str, Any], videos: Sequence[Sequence[Any]]) -> None:
        """Sample the videos in files by default, where the checkpoint (or the caller) says how."""
        flat = [video for row in videos for video in row]
        inner = dict(options.get("videos_kwargs") or {})
        if not flat or "do_sample_frames" in options or "do_sample_frames" in inner:
            return
        asked = [name for name in ("fps", "num_frames") if (inner | options).get(name) is not None]
        processor = self.video_processor
        ready = processor is not None and processor.fps is not None and processor.num_frames is not None
        files = all(isinstance(video, str | os.PathLike | bytes) or hasattr(video, "read") for video in flat)
        if asked or (ready and files):
            options["do_sample_frames"] = True


def media_of(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Pictures and videos of each conversation, in their order; parts that name none are left out."""
    found: dict[str, list[list[Any]]] = {"image": [], "video": []}
    for conversation in conversations:
        parts = [part for message in conversation for part in _parts(message)]
        for kind, rows in found.items():
            rows.append(
                [
                    _source(part, key)
                    for part in parts
                    if part["type"] == kind
                    for key in [next((key for key in _KEYS[kind] if part.get(key) is not None), None)]
                    if key is not None
                ]
            )
    return found["image"], found["video"]


def metadata_of(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[dict[str, Any] | None]]:
    """What each conversation's video parts say of their frames' rate, in the order of ``media_of``'s videos.

    Raises PromptError for an ``fps`` that is no positive number, or that stands beside a file, which has its own.
    """
    return [
        [_metadata(part) for message in conversation for part in _parts(message) if part["type"] == "video"
         if any(part.get(key) is not None for key in _KEYS["video"])]
        for conversation in conversations
    ]  # fmt: skip


def _metadata(part: Mapping[str, Any]) -> dict[str, Any] | None:
    fps = part.get("fps")
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise PromptError(f"A video part's fps is the number of its frames that make a second; {fps!r} came.")
    frames = next(part[key] for key in _KEYS["video"] if part.get(key) is not None)
    if isinstance(frames, str | os.PathLike | bytes) or not hasattr(frames, "__len__"):
        raise PromptError(
            "fps in a video part is the rate of frames that are given as a list; a file has its own. How many frames "
            "are taken from a file is the call's fps: apply_chat_template(…, fps=2)."
        )
    return {"total_num_frames": len(frames), "fps": fps, "duration": len(frames) / fps}


def _source(part: Mapping[str, Any], key: str) -> Any:
    value = part[key]
    if key == "base64" and isinstance(value, str) and not value[:5].lower().startswith("data:"):
        return f"data:;base64,{value}"
    return value


def _check_parts(conversations: Sequence[Sequence[Mapping[str, Any]]], template: str) -> None:
    """A part that the template does not know would vanish without a word."""
    for message in _messages(conversations):
        for part in _parts(message):
            quoted = (f"'{part['type']}'", f'"{part["type"]}"')
            if part["type"] not in ("text", "image") and not any(name in template for name in quoted):
                hint = " SmolVLM does not hear." if part["type"] == "audio" else ""
                raise PromptError(f"The chat template has no place for a part of type {part['type']!r}.{hint}")


def _messages(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    return [message for conversation in conversations for message in conversation]


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _assistant_mask(offsets: Any, replaced: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> list[int]:
    """1 for tokens that overlap a span of the rendered text, shifted past the placeholders that grew before it."""
    ends = [one["span"][1] for one in replaced]
    grown = [0] + [one["new_span"][1] - one["span"][1] for one in replaced]
    shifted = [tuple(char + grown[bisect_right(ends, char)] for char in span) for span in spans]
    return [int(any(start < last and end > first for first, last in shifted)) for start, end in offsets]
