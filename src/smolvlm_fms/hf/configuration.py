"""Our configurations as transformers' own configuration objects."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from smolvlm_fms.errors import InputError

__all__ = ["hf_config"]

# What transformers writes into config.json beside the fields of a configuration.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # generation reads them at the top, field or not
_NOT_FIELDS = {"transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "model_type"}


def hf_config(own: Any, **overrides: Any) -> Any:
    """``own`` (SmolVLMConfig, LlavaNextConfig) as transformers' configuration of that model type.

    ``overrides`` are fields of the result. InputError for a field that it does not have, or one that would make it
    the configuration of another model than ``own`` is.
    """
    values = dict(own.to_hf())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return _overridden(config, own, overrides) if overrides else config


def _overridden(config: Any, own: Any, overrides: dict[str, Any]) -> Any:
    """``config`` with ``overrides``, which must leave it a configuration of the same model (``own``)."""
    said = overrides.get("model_type", config.model_type)
    known = {*_NOT_FIELDS, *_TOKENS}
    unknown = sorted(name for name in overrides if name not in known and not hasattr(config, name))
    if unknown or said != config.model_type:
        wrong = f"model_type {said!r}" if not unknown else ", ".join(unknown)
        raise InputError(f"{type(config).__name__} of model_type {config.model_type!r} cannot be given {wrong}.")
    fields = {name: value for name, value in overrides.items() if name not in _NOT_FIELDS}
    changed = type(config).from_dict({**config.to_dict(), **fields})
    for name in _TOKENS:  # which from_dict passes over
        if name in fields:
            setattr(changed, name, fields[name])
    now, before = (type(own).from_hf(c.to_dict()).as_dict() for c in (changed, config))
    differing = sorted(name for name in now if now[name] != before[name] and name not in _TOKENS)
    if differing:
        raise InputError(
            f"The overrides describe another model than this one: {', '.join(differing)} would differ. "
            "Build it with that configuration, or change it after adapting (resize_token_embeddings)."
        )
    return changed
