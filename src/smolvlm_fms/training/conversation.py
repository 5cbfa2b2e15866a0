"""From a record of a data set to a conversation, and from a conversation to tensors.

{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "…"}]}, …]}
    ─▶ Conversation(messages, pictures)
    ─▶ text by the checkpoint's template, and where the assistant's words stand in it
    ─▶ placeholders expanded by the pictures' tile grids ─▶ token ids, labels (the assistant's words), tiles
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from smolvlm_fms.errors import ConfigurationError, ImageError, InputError, PromptError, SmolVLMError
from smolvlm_fms.processing.chat_template import normalise_conversations, render_chat
from smolvlm_fms.processing.processor import SmolVLMProcessor
from smolvlm_fms.processing.prompt import expand_placeholders, image_prompt
from smolvlm_fms.processing.sources import load_image
from smolvlm_fms.training.samples import IGNORE, Sample

__all__ = ["Conversation", "Encoder", "Measure", "read_record"]

SOURCES = ("image", "path", "url", "bytes", "base64")
"""Keys under which an image part of a message carries its picture."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat format, and the pictures of their image parts in order (paths, bytes, Pillow images …)."""

    messages: list[dict[str, Any]]
    pictures: list[Any]
    name: str = ""


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
    messages without any image part get theirs in front of the first user's words. Relative paths start at ``folder``.
    Raises InputError or PromptError.
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
    loose = record.get("images", record.get("image"))
    waiting = list(loose) if isinstance(loose, list | tuple | np.ndarray) else [] if loose is None else [loose]
    parts = [part for message in chat for part in _parts(message)]
    if waiting and not any(part["type"] == "image" for part in parts):
        _put_in_front(chat, len(waiting))
    pictures = []
    for message in chat:
        if isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for part in _parts(message):
            if part["type"] == "image":
                own = next((part[key] for key in SOURCES if part.get(key) is not None), None)
                if own is None and not waiting:
                    raise InputError(f"{name}: an image part has no picture ({', '.join(SOURCES)}), nor is one left.")
                pictures.append(_picture(waiting.pop(0) if own is None else own, folder))
            elif part["type"] != "text":
                raise InputError(f"{name}: parts of type {part['type']!r} cannot be trained on; image and text can.")
    if waiting:
        raise InputError(f"{name}: {len(waiting)} pictures of 'images' belong to no image part.")
    return Conversation([_words_only(message) for message in chat], pictures, name)


class Encoder:
    """Conversations to samples, with a checkpoint's own processor; can be sent to worker processes.

    max_length: tokens of a sample. cut: shorten longer samples at their end where that end is text, instead of leaving
    them out. Raises ConfigurationError for a processor without a chat template.
    """

    def __init__(self, processor: SmolVLMProcessor, max_length: int, cut: bool = False) -> None:
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.template = _template(processor.chat_template)
        self.image_seq_len = processor.image_seq_len
        self.max_length = max_length
        self.cut = cut
        self.tokens = processor.tokens
        self.image_token_id = processor.image_token_id

    def encode(self, conversation: Conversation) -> Sample:
        """Read the pictures and make the tensors; raises a SmolVLMError for what cannot be trained on."""
        pixels, grids = None, []
        if conversation.pictures:
            batch = self.image_processor(
                [conversation.pictures], return_tensors="pt", return_row_col_info=True, do_pad=True
            )
            pixels = batch["pixel_values"][0]
            grids = list(zip(batch["rows"][0], batch["cols"][0], strict=True))
        ids, labels, _ = self._tokens(conversation, grids)
        return Sample(torch.tensor(ids), torch.tensor(labels), pixels, name=conversation.name)

    def measure(self, conversation: Conversation) -> Measure:
        """What ``encode`` would give, from the pictures' headers alone; problems are returned, not raised."""
        try:
            plans = [self.image_processor.plan(*_size(picture)) for picture in conversation.pictures]
            ids, labels, was_cut = self._tokens(conversation, [(plan.rows, plan.cols) for plan in plans])
        except SmolVLMError as error:
            return Measure(problem=str(error))
        return Measure(
            length=len(ids),
            targets=sum(label != IGNORE for label in labels[1:]),
            image_tokens=ids.count(self.image_token_id),
            tiles=sum(plan.count for plan in plans),
            cut=was_cut,
        )

    def _tokens(
        self, conversation: Conversation, grids: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[int], bool]:
        """Ids, labels, and whether they were cut to ``max_length``."""
        text, spans = self._render(conversation)
        prompts = [image_prompt(rows, cols, self.image_seq_len, self.tokens) for rows, cols in grids]
        placeholders = text.count(self.tokens.image)
        if placeholders != len(prompts):
            raise PromptError(f"The text has {placeholders} {self.tokens.image} for {len(prompts)} pictures.")
        (expanded,), (places,) = expand_placeholders([text], prompts, tokens=self.tokens)
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
        (text,), (marks,) = render_chat([messages], self.template, mark_generation="{% generation" in self.template)
        if marks:
            return text, list(marks)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            (before,), _ = render_chat([messages[:index]], self.template, add_generation_prompt=True)
            (after,), _ = render_chat([messages[: index + 1]], self.template)
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


def _put_in_front(chat: list[dict[str, Any]], count: int) -> None:
    """Give the first user's message ``count`` image parts before its words."""
    first = next((message for message in chat if message["role"] == "user"), None)
    if first is None:
        raise InputError("There are pictures, but no user's message that could show them.")
    words = first.get("content") or ""
    text = [{"type": "text", "text": words}] if isinstance(words, str) else list(words)
    first["content"] = [{"type": "image"} for _ in range(count)] + text


def _words_only(message: dict[str, Any]) -> dict[str, Any]:
    """The message without its pictures' data, which templates have no use for (and workers would be sent)."""
    parts = [{key: value for key, value in part.items() if key not in SOURCES} for part in _parts(message)]
    return {**message, "content": parts}


def _picture(source: Any, folder: Path) -> Any:
    """A picture's source in a form that ``load_image`` reads; relative paths start at ``folder``."""
    if isinstance(source, Mapping):  # how parquet files and `datasets` write pictures
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str) and not source.startswith(("http://", "https://", "data:")) and len(source) < 1024:
        return str(folder / Path(source).expanduser())
    if source is None:
        raise InputError("A picture is None; it needs a path or bytes.")
    return source


def _size(picture: Any) -> tuple[int, int]:
    """(height, width) of an upright picture, from its header where that is enough."""
    try:
        if isinstance(picture, str) and not picture.startswith(("http://", "https://", "data:")):
            with Image.open(picture) as opened:
                return _upright_size(opened)
        if isinstance(picture, bytes):
            with Image.open(io.BytesIO(picture)) as opened:
                return _upright_size(opened)
    except FileNotFoundError:
        raise ImageError(f"There is no picture {picture}.") from None
    except Exception as error:  # decoders of untrusted bytes raise whatever they trip over
        raise ImageError(f"The picture {_short(picture)} cannot be read: {error}") from None
    loaded = load_image(picture)
    if isinstance(loaded, Image.Image):
        return loaded.height, loaded.width
    height, width = loaded.shape[-3:-1] if loaded.shape[-1] in (1, 3, 4) else loaded.shape[-2:]
    return int(height), int(width)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 … 8 swap the sides
    return (image.width, image.height) if turned else (image.height, image.width)


def _short(picture: Any) -> str:
    return str(picture) if isinstance(picture, str) else f"of {len(picture)} bytes"
