"""From a record of a data set to a conversation, and from a conversation to tensors.

{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "…"}]}, …]}
    ─▶ Conversation(messages, pictures, videos)
    ─▶ text by the checkpoint's template, and where the assistant's words stand in it
    ─▶ placeholders expanded by the pictures' tile grids ─▶ token ids, labels (the assistant's words), tiles
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smolvlm_fms.errors import ConfigurationError, InputError, PromptError, SmolVLMError
from smolvlm_fms.processing.chat_template import VIDEO_TEMPLATE, normalise_conversations, render_chat
from smolvlm_fms.processing.prompt import expand_placeholders
from smolvlm_fms.training.media import Prompts, Video, media_for, picture_source, video_source
from smolvlm_fms.training.samples import IGNORE, Sample

__all__ = ["Conversation", "Encoder", "Measure", "read_record"]

SOURCES = ("image", "video", "path", "url", "bytes", "base64")
"""Keys under which a part of a message carries its picture or video."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat format, and the pictures and videos of their parts, in order.

    pictures: paths, bytes, Pillow images …; videos: ``Video`` records.
    """

    messages: list[dict[str, Any]]
    pictures: list[Any]
    name: str = ""
    videos: list[Video] = field(default_factory=list)


@dataclass(frozen=True)
class Measure:
    """What a conversation would cost: tokens, learnt ones, image tokens, tiles. ``problem`` says why it is left out."""

    length: int = 0
    targets: int = 0
    image_tokens: int = 0
    tiles: int = 0
    cut: bool = False
    problem: str = ""


def read_record(record: Mapping[str, Any], folder: Path, name: str) -> Conversation:
    """Understand one record.

    ``messages`` (or ``conversations``) in the chat format, or ``texts`` [{"user": …, "assistant": …}] (The Cauldron's).
    Pictures stand in the image parts, or in ``images`` (or ``image``), whose members fill the parts that have none;
    messages without any image part get theirs in front of the first user's words. Videos likewise, in video parts or
    ``videos`` (or ``video``): a file, or a list of frames, with their ``fps`` in the part. Relative paths start at
    ``folder``. Raises InputError or PromptError.
    """
    messages = record.get("messages") or record.get("conversations")
    if messages is None and record.get("texts") is not None:
        messages = [
            {"role": role, "content": turn[role]}
            for turn in record["texts"]
            for role in ("user", "assistant")
            if turn.get(role)
        ]
    if messages is None:
        raise InputError(f"{name}: a record needs 'messages' in the chat format; it has {sorted(map(str, record))}.")
    (chat,), _ = normalise_conversations([messages])
    waiting = {kind: _loose(record, kind) for kind in ("image", "video")}
    for kind, media in waiting.items():
        if media and not any(part["type"] == kind for message in chat for part in _parts(message)):
            _put_in_front(chat, kind, len(media))
    pictures, videos = [], []
    for message in chat:
        if isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for part in _parts(message):
            kind = part["type"]
            if kind == "text":
                continue
            if kind not in waiting:
                raise InputError(f"{name}: parts of type {kind!r} cannot be trained on; image, video and text can.")
            own = next((part[key] for key in SOURCES if part.get(key) is not None), None)
            if own is None and not waiting[kind]:
                what = "an image part has no picture" if kind == "image" else "a video part has no video"
                raise InputError(f"{name}: {what} ({', '.join(SOURCES)}), nor is one left.")
            source = waiting[kind].pop(0) if own is None else own
            if kind == "image":
                pictures.append(picture_source(source, folder))
            else:
                videos.append(video_source(source, folder, part.get("fps")))
    for kind, noun in (("image", "pictures"), ("video", "videos")):
        if waiting[kind]:
            raise InputError(f"{name}: {len(waiting[kind])} {noun} of '{kind}s' belong to no {kind} part.")
    return Conversation([_words_only(message) for message in chat], pictures, name, videos)


class Encoder:
    """Conversations to samples, with a checkpoint's own processor; can be sent to worker processes.

    max_length: tokens of a sample. cut: shorten longer samples at their end where that end is text, instead of leaving
    them out. Raises ConfigurationError for a processor without a chat template.
    """

    def __init__(self, processor: Any, max_length: int, cut: bool = False) -> None:
        self.media = media_for(processor)
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.template = _template(processor.chat_template)
        self.max_length = max_length
        self.cut = cut
        self.tokens = processor.tokens
        self.image_token_id = processor.image_token_id

    def encode(self, conversation: Conversation) -> Sample:
        """Read pictures and videos and make the tensors; raises a SmolVLMError for what cannot be trained on."""
        kinds = [part["type"] for message in conversation.messages for part in _parts(message)]
        shown = [kind for kind in kinds if kind != "text"]
        prompts, pixels = self.media.load(conversation.pictures, conversation.videos, shown)
        ids, labels, _ = self._tokens(conversation, prompts)
        return Sample(torch.tensor(ids), torch.tensor(labels), name=conversation.name, **pixels)

    def measure(self, conversation: Conversation) -> Measure:
        """What ``encode`` would give, from the media's headers alone; problems are returned, not raised."""
        try:
            prompts = self.media.plan(conversation.pictures, conversation.videos)
            ids, labels, was_cut = self._tokens(conversation, prompts)
        except SmolVLMError as error:
            return Measure(problem=str(error))
        return Measure(
            length=len(ids),
            targets=sum(label != IGNORE for label in labels[1:]),
            image_tokens=ids.count(self.image_token_id),
            tiles=prompts.tiles,
            cut=was_cut,
        )

    def _tokens(self, conversation: Conversation, prompts: Prompts) -> tuple[list[int], list[int], bool]:
        """Ids, labels, and whether they were cut to ``max_length``."""
        text, spans = self._render(conversation)
        for token, given in ((self.tokens.image, prompts.images), (self.tokens.video, prompts.videos)):
            if text.count(token) != len(given):
                raise PromptError(f"The text has {text.count(token)} {token} for {len(given)} of them.")
        (expanded,), (places,) = expand_placeholders([text], prompts.images, prompts.videos, self.tokens)
        shifts = [(place.span[1], len(place.replacement) - len(place.text)) for place in places]
        moved = [tuple(at + sum(by for end, by in shifts if end <= at) for at in span) for span in spans]
        coded = self.tokenizer([expanded], add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(coded["input_ids"][0]), coded["offset_mapping"][0]
        labels = [IGNORE] * len(ids)
        for place, (start, end) in enumerate(offsets):
            learnt = any(first <= start and end <= last for first, last in moved) and end > start
            if learnt and ids[place] != self.image_token_id:
                labels[place] = ids[place]
        was_cut = len(ids) > self.max_length
        if was_cut:
            ids, labels = self._shorten(ids, labels)
        if all(label == IGNORE for label in labels[1:]):
            raise PromptError(
                "There is no answer of the assistant to learn" + (" within max_length." if was_cut else ".")
            )
        return ids, labels, was_cut

    def _shorten(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Cut at ``max_length``; raises PromptError where the end holds a picture, which is never cut through."""
        if not self.cut:
            raise PromptError(f"It has {len(ids)} tokens, more than max_length {self.max_length}.")
        if self.image_token_id in ids[self.max_length :]:
            raise PromptError(f"It has {len(ids)} tokens, and max_length {self.max_length} would cut into a picture.")
        return ids[: self.max_length], labels[: self.max_length]

    def _render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text and the (start, end) characters of what the assistant says, end token included."""
        messages = conversation.messages
        # SmolVLM2's checkpoints have learnt videos under a layout that is not in their files.
        template = VIDEO_TEMPLATE if conversation.videos else self.template
        (text,), (marks,) = render_chat([messages], template, mark_generation="{% generation" in template)
        if marks:
            return text, list(marks)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            (before,), _ = render_chat([messages[:index]], template, add_generation_prompt=True)
            (after,), _ = render_chat([messages[: index + 1]], template)
            if not (after.startswith(before) and text.startswith(after)):
                raise PromptError("The chat template writes earlier turns differently once later ones follow.")
            # The line break behind the end token is the template's, not the assistant's.
            spans.append((len(before), len(after.rstrip("\n"))))
        return text, spans


def _template(templates: str | Mapping[str, str] | None) -> str:
    template = templates.get("default") if isinstance(templates, Mapping) else templates
    if template is None:
        raise ConfigurationError("The checkpoint has no chat template (chat_template.jinja); training needs one.")
    return template


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _loose(record: Mapping[str, Any], kind: str) -> list[Any]:
    """Pictures or videos that stand beside the messages; a video of frames is a list of its own."""
    found = record.get(f"{kind}s", record.get(kind))
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple | np.ndarray) else [found]


def _put_in_front(chat: list[dict[str, Any]], kind: str, count: int) -> None:
    """Give the first user's message ``count`` parts of ``kind`` before its words."""
    first = next((message for message in chat if message["role"] == "user"), None)
    if first is None:
        raise InputError("There are pictures or videos, but no user's message that could show them.")
    words = first.get("content") or ""
    text = [{"type": "text", "text": words}] if isinstance(words, str) else list(words)
    first["content"] = [{"type": kind} for _ in range(count)] + text


def _words_only(message: dict[str, Any]) -> dict[str, Any]:
    """The message without its media's data, which templates have no use for (and workers would be sent)."""
    parts = [{key: value for key, value in part.items() if key not in (*SOURCES, "fps")} for part in _parts(message)]
    return {**message, "content": parts}
