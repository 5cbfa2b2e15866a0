"""A checkpoint's folder, local or from the hub, as far as processors read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolvlm_fms.errors import ConfigurationError, FetchError, PromptError
from smolvlm_fms.processing.files import read_json

__all__ = ["HUB_OPTIONS", "checkpoint_folder", "image_seq_len", "read_chat_template", "write_chat_template"]

#: Arguments of ``from_pretrained`` that say where files come from.
HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
# Configuration, tokenizer and templates: a few megabytes, never the weights.
_PATTERNS = ["*.json", "*.jinja", "chat_templates/*.jinja"]
_WEIGHTS = ["*.safetensors.index.json", "onnx/*", "*/onnx/*"]


def checkpoint_folder(name: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder of that name, or the hub model's processor files in the local cache, downloaded where missing.

    Raises FetchError where there is neither such a folder nor a hub model that can be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    text = os.fspath(name)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FetchError(f"{text}: no such folder, and no hub id (owner/name) either.")
    from huggingface_hub import snapshot_download

    given = {key: value for key, value in hub.items() if value is not None}
    try:
        return Path(snapshot_download(text, allow_patterns=_PATTERNS, ignore_patterns=_WEIGHTS, **given))
    except Exception as error:  # the hub's client raises a dozen kinds, from HTTP to missing cache
        raise FetchError(
            f"{text}: no such folder, and the hub model could not be fetched: {_first_line(error)}"
        ) from error


def read_chat_template(folder: Path, processor: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template of a folder: in processor_config.json, chat_template.json (transformers 4), or .jinja files.

    Several templates come as a dictionary by name, the usual one as ``default``.
    """
    if processor.get("chat_template"):
        return processor["chat_template"]  # type: ignore[no-any-return]
    legacy = read_json(folder / "chat_template.json", missing_ok=True).get("chat_template")
    if isinstance(legacy, str):
        return legacy
    found = {file.stem: file for file in sorted((folder / "chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = folder / "chat_template.jinja"
    try:
        templates = {name: file.read_text(encoding="utf-8") for name, file in found.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{folder}: a chat template cannot be read: {error}") from error
    return templates.get("default") if set(templates) <= {"default"} else templates


def write_chat_template(folder: Path, template: str | Mapping[str, str] | None) -> list[Path]:
    """Write ``chat_template.jinja``, and further named templates into ``chat_templates/``."""
    templates = {"default": template} if isinstance(template, str) else dict(template or {})
    written = []
    for name, text in templates.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise PromptError(f"A chat template cannot be named {name!r}: the name becomes a file's.")
        file = folder / "chat_template.jinja" if name == "default" else folder / "chat_templates" / f"{name}.jinja"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        written.append(file)
    return written


def image_seq_len(folder: Path, processor: Mapping[str, Any]) -> int:
    """``<image>`` tokens a tile: as the processor's file says, else as the model's shapes give, else Idefics3's 169."""
    said = processor.get("image_seq_len")
    if said is not None:
        if not isinstance(said, int) or isinstance(said, bool) or said < 1:
            raise ConfigurationError(f"{folder}: image_seq_len is {said!r}; it must be a whole number from 1 on.")
        return said
    model = read_json(folder / "config.json", missing_ok=True)
    if not model:
        return 169
    from smolvlm_fms.config import SmolVLMConfig

    return SmolVLMConfig.from_hf(model).tokens_per_tile


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
