"""Architectures, variants and checkpoint formats, in FMS's registries."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fms.utils import serialization

from smolvlm_fms.config import BaseConfig, SmolVLMConfig
from smolvlm_fms.config_llava import LLAVA_PRESETS, LlavaNextConfig
from smolvlm_fms.config_presets import PRESETS
from smolvlm_fms.errors import CheckpointError, ConfigurationError
from smolvlm_fms.fms_bridge.adapters import FAMILIES, SOURCES, STEPS
from smolvlm_fms.fms_bridge.llava_next import LLAVA_NEXT
from smolvlm_fms.fms_bridge.reading import guard_reader

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "register_configurations", "register_models"]

FAMILIES["smolvlm_llava_next"] = LLAVA_NEXT


@dataclass(frozen=True)
class Architecture:
    """One model class of ours: its name with FMS, what it reads, and where it lives.

    model: ``module:class``, imported when a model is built: FMS is being imported by that very module when we register.
    """

    name: str
    model_types: tuple[str, ...]
    hf_classes: tuple[str, ...]
    config: type[BaseConfig]
    model: str
    presets: Mapping[str, BaseConfig]

    def model_class(self) -> Any:
        """The model's class."""
        module, _, name = self.model.partition(":")
        return getattr(importlib.import_module(module), name)


ARCHITECTURES: dict[str, Architecture] = {
    "smolvlm": Architecture(
        name="smolvlm",
        model_types=("smolvlm", "idefics3"),
        hf_classes=("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
        config=SmolVLMConfig,
        model="smolvlm_fms.model.smolvlm:SmolVLM",
        presets=PRESETS,
    ),
    # FMS has a llava_next of its own, which keeps its name and its checkpoints' class.
    "smolvlm_llava_next": Architecture(
        name="smolvlm_llava_next",
        model_types=("llava_next",),
        hf_classes=(),
        config=LlavaNextConfig,
        model="smolvlm_fms.model.llava_next:LlavaNext",
        presets=LLAVA_PRESETS,
    ),
}
"""Every architecture of ours, by its name with FMS."""


def architecture_of(model_type: Any) -> Architecture:
    """The architecture that reads ``config.json`` files of ``model_type``; raises ConfigurationError."""
    for architecture in ARCHITECTURES.values():
        if model_type in architecture.model_types:
            return architecture
    known = sorted(t for a in ARCHITECTURES.values() for t in a.model_types)
    raise ConfigurationError(f"model_type {model_type!r} is not supported; {', '.join(known)} are.")


def register_models() -> None:
    """Register variants, adapter steps and sources. Idempotent. Imports ``fms.models``, and FSDP and sympy with it:
    whoever builds our models without ``get_model`` need not (see ``register_with_fms``)."""
    from fms import models

    for architecture in ARCHITECTURES.values():
        if architecture.name in models.list_models():
            continue
        for variant, config in architecture.presets.items():
            models.register_model(architecture.name, variant, _factory(architecture, config))
        family = FAMILIES[architecture.name]
        for step, build in STEPS.items():
            serialization.register_adapter_step(architecture.name, step, build(family))
        for source, steps in SOURCES.items():
            serialization.register_adapter(architecture.name, source, list(steps))
    if not isinstance(serialization._get_adapter, _StrictAdapters):
        serialization._get_adapter = _StrictAdapters(serialization._get_adapter)
    guard_reader()


def _factory(architecture: Architecture, config: BaseConfig) -> Callable[..., Any]:
    def build(**changes: Any) -> Any:
        changes.pop("model_path", None)  # get_model("hf_pretrained", model_path=…) leaves it among the fields
        return architecture.model_class()(config, **changes)

    return build


class _StrictAdapters:
    """FMS takes an unknown ``source`` for its own format, finds no tensor it knows, and leaves the model
    uninitialised without a word. For our architectures that is an error; others keep FMS's behaviour.
    """

    def __init__(self, lookup: Callable[[str, str | None], Any]) -> None:
        self.lookup = lookup

    def __call__(self, architecture: str, source: str | None) -> Any:
        known = serialization.list_sources(architecture)
        if architecture in ARCHITECTURES and source is not None and source not in known:
            raise CheckpointError(f"Unknown source {source!r} for {architecture}; known: {', '.join(sorted(known))}.")
        return self.lookup(architecture, source)


def register_configurations() -> None:
    """Let ``get_model("hf_pretrained", …)`` recognise our checkpoints. Imports transformers, as FMS does there."""
    from fms.models.hf.config_utils import _FMS_MODEL_CONFIG_REGISTRY

    for architecture in ARCHITECTURES.values():
        for name in architecture.hf_classes:
            if name not in _FMS_MODEL_CONFIG_REGISTRY.model_arch_mappings:
                _FMS_MODEL_CONFIG_REGISTRY.register_model_arch_info(
                    name, architecture.name, _parameters(architecture.config)
                )


def _parameters(config_class: Any) -> Callable[[Any], dict[str, Any]]:
    def build(hf_config: Any) -> dict[str, Any]:
        config = config_class.from_hf(hf_config.to_dict())
        return {f.name: getattr(config, f.name) for f in fields(config)}

    return build
