"""``register()``: transformers' Auto classes and pipelines give this package's models and processors; ``unregister()``.

Models go through transformers' own registration. Processors cannot: ``AutoProcessor`` follows the class name that a
checkpoint's files carry straight to transformers' class. So ``from_pretrained`` of the three processor factories is
replaced by one that looks at the checkpoint's ``model_type`` first and otherwise calls the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    Idefics3Config,
    LlavaNextConfig,
    SmolVLMConfig,
)

from smolvlm_fms.errors import InputError
from smolvlm_fms.fms_bridge.loading import resolve_folder
from smolvlm_fms.hf.adapter import FmsForConditionalGeneration, FmsModel
from smolvlm_fms.hf.processors import FmsProcessor
from smolvlm_fms.processing import load_processor
from smolvlm_fms.processing.video import SmolVLMVideoProcessor

__all__ = ["register", "unregister"]

MODEL_TYPES = ("smolvlm", "idefics3")

_originals: dict[str, Any] = {}
"""Name in ``transformers`` to what stood there: a placeholder class, or the ``from_pretrained`` of a real one."""


class FmsSmolVLM(FmsForConditionalGeneration):
    """Ours for ``model_type`` smolvlm."""

    config_class = SmolVLMConfig


class FmsIdefics3(FmsForConditionalGeneration):
    """Ours for ``model_type`` idefics3."""

    config_class = Idefics3Config


class FmsLlavaNext(FmsForConditionalGeneration):
    """Ours for ``model_type`` llava_next."""

    config_class = LlavaNextConfig


class FmsSmolVLMModel(FmsModel):
    """Ours for ``model_type`` smolvlm, without the head."""

    config_class = SmolVLMConfig


class FmsIdefics3Model(FmsModel):
    """Ours for ``model_type`` idefics3, without the head."""

    config_class = Idefics3Config


class FmsLlavaNextModel(FmsModel):
    """Ours for ``model_type`` llava_next, without the head."""

    config_class = LlavaNextConfig


_CLASSES: dict[str, tuple[Any, Any]] = {
    "smolvlm": (FmsSmolVLM, FmsSmolVLMModel),
    "idefics3": (FmsIdefics3, FmsIdefics3Model),
    "llava_next": (FmsLlavaNext, FmsLlavaNextModel),
}
"""With the head, and without."""


def register(model_types: Sequence[str] = MODEL_TYPES) -> None:
    """From now on AutoModelForImageTextToText, AutoModel, AutoProcessor, AutoImageProcessor, AutoVideoProcessor and
    ``pipeline("image-text-to-text")`` give this package's classes for checkpoints of ``model_types``
    (``smolvlm``, ``idefics3``; also ``llava_next`` where it is named). Calling it again changes the types. Raises
    InputError for other types.
    """
    model_types = (model_types,) if isinstance(model_types, str) else tuple(model_types)
    unknown = sorted(set(map(str, model_types)) - set(_CLASSES))
    if unknown:
        raise InputError(f"register() does not know {unknown}; it has {', '.join(_CLASSES)}.")
    unregister()
    for model_type in model_types:
        whole, headless = _CLASSES[model_type]
        for auto in _model_factories():
            auto.register(whole.config_class, whole, exist_ok=True)
        AutoModel.register(headless.config_class, headless, exist_ok=True)
    factories: dict[str, Callable[..., Any]] = {
        "AutoProcessor": FmsProcessor.from_pretrained,
        "AutoImageProcessor": _image_processor,
        "AutoVideoProcessor": SmolVLMVideoProcessor.from_pretrained,
    }
    for name, ours in factories.items():
        auto = getattr(transformers, name)
        original = auto.__dict__.get("from_pretrained")
        if original is None:  # without torchvision: a placeholder that refuses every use, so another class stands in
            _originals[name] = auto
            place = type(name, (), {"from_pretrained": classmethod(_dispatching(_refuse(auto), ours, model_types))})
            setattr(transformers, name, place)
        else:
            _originals[name] = original
            auto.from_pretrained = classmethod(_dispatching(original.__func__, ours, model_types))


def unregister() -> None:
    """Give transformers its own classes back. Does nothing where ``register`` was not called."""
    for auto in (*_model_factories(), AutoModel):
        extra = auto._model_mapping._extra_content
        for classes in _CLASSES.values():
            if extra.get(classes[0].config_class) in classes:
                del extra[classes[0].config_class]
    for name, original in _originals.items():
        if isinstance(original, type):
            setattr(transformers, name, original)
        else:
            getattr(transformers, name).from_pretrained = original
    _originals.clear()


def _model_factories() -> list[Any]:
    """The Auto classes that have our models: pipelines of transformers 5 and 4 each look into one of their own."""
    names = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq")
    return [getattr(transformers, name) for name in names if hasattr(transformers, name)]


def _image_processor(name: str | Path, **kwargs: Any) -> Any:
    return load_processor(resolve_folder(name), **kwargs).image_processor


def _refuse(placeholder: Any) -> Callable[..., Any]:
    """A ``from_pretrained`` that says what transformers' placeholder class says (that torchvision is missing)."""
    return lambda _cls, *inputs, **kwargs: placeholder.from_pretrained(*inputs, **kwargs)


def _dispatching(original: Callable[..., Any], ours: Callable[..., Any], model_types: tuple[str, ...]) -> Any:
    """A ``from_pretrained`` that gives ours for our model types and the original's result for all others."""

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        if _model_type(pretrained_model_name_or_path) not in model_types:
            return original(cls, pretrained_model_name_or_path, *inputs, **kwargs)
        # What pipelines pass to every factory they call, and says nothing to a processor.
        ignored = ("use_fast", "trust_remote_code", "config", "backend", "code_revision", "dtype", "torch_dtype")
        options = {n: v for n, v in kwargs.items() if not n.startswith("_") and n not in ignored}
        return ours(pretrained_model_name_or_path, **options)

    return from_pretrained


def _model_type(name: Any) -> str | None:
    """The checkpoint's model type; None for a folder without a configuration or a name that cannot be resolved."""
    try:
        return str(AutoConfig.from_pretrained(name).model_type)
    except (OSError, ValueError):
        return None
