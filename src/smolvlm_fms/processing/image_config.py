"""The image processor's file in a checkpoint's folder, in transformers' format."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from smolvlm_fms.errors import ConfigurationError, FetchError
from smolvlm_fms.processing.options import DEFAULTS

__all__ = ["read_settings", "write_settings"]

_OWN_FILE = "preprocessor_config.json"
_SHARED_FILE = "processor_config.json"
_SECTION = "image_processor"


def read_settings(path: Path, known: Container[str] = DEFAULTS) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings that the processor has, which are ``known``, and the other fields of the file).

    ``path`` is a folder or the file itself. The section in ``processor_config.json`` counts first, as in transformers.

    Raises:
        FetchError: neither file is there.
        ConfigurationError: the file is not a JSON object.
    """
    fields = _find(path)
    settings = {name: value for name, value in fields.items() if name in known and value is not None}
    unused = {name: value for name, value in fields.items() if name not in known}
    # The class name is the only place where transformers 4 says which of its two back ends a checkpoint asks for.
    if str(fields.get("image_processor_type", "")).endswith("Fast"):
        settings.setdefault("backend", "torch")
    return settings, unused


def write_settings(folder: Path, fields: dict[str, Any]) -> list[Path]:
    """Write ``preprocessor_config.json``, and the section of ``processor_config.json`` where there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / _OWN_FILE]
        written[0].write_text(_dump(fields), encoding="utf-8")
        shared = folder / _SHARED_FILE
        if shared.is_file() and _SECTION in (whole := _load(shared)):
            shared.write_text(_dump(whole | {_SECTION: fields}), encoding="utf-8")
            written.append(shared)
    except OSError as error:
        raise FetchError(f"The image processor could not be saved in {folder}: {error}") from error
    return written


def _find(path: Path) -> dict[str, Any]:
    if path.is_file():
        fields = _load(path)
        section = fields.get(_SECTION, fields)
        return section if isinstance(section, dict) else fields
    shared, own = path / _SHARED_FILE, path / _OWN_FILE
    if shared.is_file() and isinstance(section := _load(shared).get(_SECTION), dict):
        return section
    if own.is_file():
        return _load(own)
    raise FetchError(f"{path} holds neither {_OWN_FILE} nor a {_SHARED_FILE} with a section {_SECTION!r}.")


def _load(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FetchError(f"{path} could not be read: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{path} holds {type(fields).__name__}, not a JSON object.")
    return fields


def _dump(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
