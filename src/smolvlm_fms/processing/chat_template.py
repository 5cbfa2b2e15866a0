"""Messages to text, by the checkpoint's own Jinja template.

A template is a program that came with the weights, so it runs in Jinja's immutable sandbox and sees plain data only: no
pictures, arrays or other objects with methods. The environment is the one that checkpoints' templates are written for
(``trim_blocks``, ``lstrip_blocks``, ``break``/``continue``, ``tojson`` without HTML escapes, ``raise_exception``,
``strftime_now``, and ``{% generation %}`` blocks that mark the assistant's words).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from smolvlm_fms.errors import PromptError

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["VIDEO_TEMPLATE", "Span", "normalise_conversations", "render_chat", "template_variables"]

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Span = tuple[int, int]

# SmolVLM2 was trained on videos with this layout; the template in its checkpoint knows pictures only.
VIDEO_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# Private-use characters around the assistant's words while a template renders; they never leave this module.
_MARK_OPEN, _MARK_CLOSE = "\ue0f0\ue0f1", "\ue0f1\ue0f0"
_CONTINUE_TAG = "\ue0f2continue\ue0f2 "  # the last blank tells whether the template trims
_marking: ContextVar[bool] = ContextVar("marking", default=False)

_warned: set[str] = set()


def normalise_conversations(conversation: Any) -> tuple[list[list[Message]], bool]:
    """One conversation or several, as a list of lists of fresh message dictionaries, and whether there were several.

    Keys that are None are dropped (``"tool_calls": None``), OpenAI's ``image_url`` parts become ``image`` parts, and
    the caller's own messages are never changed.

    Raises PromptError where a message is no dictionary, has no role, or has a part without a type.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise PromptError(f"Expected a list of messages, got {_describe(conversation)}.")
    is_batched = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
    conversations = conversation if is_batched else [conversation]
    return [
        [_message(message, row, index) for index, message in enumerate(getattr(chat, "messages", chat))]
        for row, chat in enumerate(conversations)
    ], is_batched


def render_chat(
    conversations: Sequence[Sequence[Message]],
    template: str,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    mark_generation: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> tuple[list[str], list[list[Span]]]:
    """Render each conversation and say where the assistant's words stand.

    add_generation_prompt: end with the header of an assistant's turn; continue_final_message: end inside the last
    message instead (a string names the field to continue, ``"content"`` by default); mark_generation: also return the
    (start, end) characters of every ``{% generation %}`` block; variables: further names for the template.

    A message whose content is a plain string reaches templates that read lists of parts, too: they drop a string's
    words without a word, so a conversation that lost one is rendered again with the string as a text part.

    Raises PromptError for a template that does not compile, that fails, or that refuses the messages.
    """
    compiled = _compile(template)
    shared = {"tools": _plain(_tool_schemas(tools)), "documents": _plain(documents), **_plain(variables)}
    shared["add_generation_prompt"] = add_generation_prompt
    if mark_generation and not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
        warn_once("The chat template has no {% generation %} block, so the assistant mask is all zeros.")
    texts, spans = [], []
    for conversation in conversations:
        chat = _plain(list(conversation))
        _warn_text_first(chat)
        if continue_final_message:
            chat = _tag_final_message(chat, continue_final_message, template)
        text = _render(compiled, chat, shared, mark_generation)
        if _lost_a_string(chat, text, template):
            text = _render(compiled, [_string_as_part(message) for message in chat], shared, mark_generation)
        if continue_final_message:
            text = _cut_at_tag(text)
        text, marks = _take_marks(text) if mark_generation else (text, [])
        texts.append(text)
        spans.append(marks)
    return texts, spans


@lru_cache(maxsize=64)
def template_variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself; other keyword arguments are meant for the processor."""
    from jinja2 import TemplateError, meta

    environment = _environment()
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateError as error:
        raise PromptError(f"The chat template does not compile: {error}.") from error


def warn_once(message: str) -> None:
    """Log a warning the first time that its text comes up in this process."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


@lru_cache(maxsize=1)
def _environment() -> Any:
    # Jinja is imported here so that `import smolvlm_fms` stays quick.
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}``: the words inside are the assistant's."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_MARK_OPEN}{caller()}{_MARK_CLOSE}" if _marking.get() else str(caller())

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    # The class itself would hand templates its methods (`mro` and the like); they only ever call it.
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment


@lru_cache(maxsize=64)
def _compile(template: str) -> Template:
    from jinja2 import TemplateError

    try:
        compiled: Template = _environment().from_string(template)
    except TemplateError as error:
        raise PromptError(f"The chat template does not compile: {error}.") from error
    return compiled


def _render(compiled: Template, chat: list[Message], shared: Mapping[str, Any], mark: bool) -> str:
    try:
        with _marks(mark):
            return compiled.render(messages=chat, **shared)
    except Exception as error:  # a template is somebody else's program: whatever it raises concerns these messages
        raise PromptError(f"The chat template refused these messages: {type(error).__name__}: {error}.") from error


@contextmanager
def _marks(active: bool) -> Iterator[None]:
    token = _marking.set(active)
    try:
        yield
    finally:
        _marking.reset(token)


def _take_marks(text: str) -> tuple[str, list[Span]]:
    """Take the marks out of a rendered text and return where they stood."""
    pieces: list[str] = []
    spans: list[Span] = []
    length, start = 0, 0
    for piece in re.split(f"({_MARK_OPEN}|{_MARK_CLOSE})", text):
        if piece == _MARK_OPEN:
            start = length
        elif piece == _MARK_CLOSE:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _message(message: Any, row: int, index: int) -> Message:
    if callable(getattr(message, "model_dump", None)):
        message = message.model_dump()
    elif dataclasses.is_dataclass(message) and not isinstance(message, type):
        message = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    where = f"Message {index} of conversation {row}"
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} must be a dictionary with 'role' and 'content', got {_describe(message)}.")
    fresh = {key: value for key, value in message.items() if value is not None}
    if not isinstance(fresh.get("role"), str):
        raise PromptError(f"{where} has no 'role' (user, assistant or system); its keys are {sorted(map(str, fresh))}.")
    content = fresh.get("content")
    if isinstance(content, list | tuple):
        fresh["content"] = [_part(part, where) for part in content]
    elif content is not None and not isinstance(content, str):
        raise PromptError(f"{where}: 'content' must be a string or a list of parts, got {_describe(content)}.")
    return fresh


def _part(part: Any, where: str) -> Any:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise PromptError(
            f"{where}: every part of 'content' is a dictionary with a 'type', such as "
            f"{{'type': 'text', 'text': '…'}} or {{'type': 'image', 'path': '…'}}; got {_describe(part)}."
        )
    if part["type"] == "image_url" and "image_url" in part:
        address = part["image_url"]
        return {"type": "image", "url": address.get("url", "") if isinstance(address, Mapping) else address}
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise PromptError(f"{where}: a text part needs its words under 'text', got {_describe(part.get('text'))}.")
    return dict(part)


def _plain(value: Any) -> Any:
    """What a template may see: JSON's types. Anything else becomes its type's name, e.g. ``"<ndarray>"``."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    return f"<{type(value).__name__}>"


def _tool_schemas(tools: Sequence[Any] | None) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise PromptError(f"A tool is given as its JSON schema (a dictionary), got {_describe(tool)}.")
    return list(tools)


def _tag_final_message(chat: list[Message], field: bool | str, template: str) -> list[Message]:
    """Append the tag to the last message's words, so that what the template writes behind them can be cut off."""
    name = field if isinstance(field, str) else "content"
    if not chat or chat[-1].get(name) is None:
        raise PromptError(f"continue_final_message: the last message has no {name!r} to continue.")
    if name not in template:
        raise PromptError(f"continue_final_message: the chat template does not read {name!r}.")
    last = dict(chat[-1])
    words = last[name]
    if isinstance(words, str):
        last[name] = words + _CONTINUE_TAG
    else:
        texts = [index for index, part in enumerate(words) if "text" in part]
        if not texts:
            raise PromptError("continue_final_message: the last message has no text part to continue.")
        last[name] = list(words)
        last[name][texts[-1]] = {**words[texts[-1]], "text": words[texts[-1]]["text"] + _CONTINUE_TAG}
    return [*chat[:-1], last]


def _cut_at_tag(text: str) -> str:
    end = text.rfind(_CONTINUE_TAG.strip())
    if end < 0:
        raise PromptError("continue_final_message: the chat template dropped the last message's words.")
    return text[:end] if text.startswith(_CONTINUE_TAG, end) else text[:end].rstrip()


def _lost_a_string(chat: Sequence[Message], text: str, template: str) -> bool:
    if not re.search(r"\[.type.\]|\.type\b", template):
        return False  # a template of text chats: a list of parts would mean nothing to it
    return any(isinstance(message.get("content"), str) and message["content"].strip() not in text for message in chat)


def _string_as_part(message: Message) -> Message:
    if isinstance(message.get("content"), str):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message


def _warn_text_first(chat: Sequence[Message]) -> None:
    for message in chat:
        content = message.get("content")
        kinds = [part.get("type") for part in content] if isinstance(content, list) else []
        if "text" in kinds and any(kind in ("image", "video") for kind in kinds[kinds.index("text") :]):
            warn_once(
                "A message has text before its picture or video. The order is kept, but SmolVLM was trained with "
                "pictures first and answers better that way."
            )


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
