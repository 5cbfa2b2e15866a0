"""The only home of transformers at run time. ``from smolvlm_fms.hf import to_hf_api, register, unregister``."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "to_hf_api": "adapter",
    "FmsForConditionalGeneration": "adapter",
    "FmsVisionTransformer": "adapter",
    "FmsModel": "adapter",
    "register": "registry",
    "unregister": "registry",
    "verify": "certificate",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        from smolvlm_fms.errors import MissingDependencyError

        raise MissingDependencyError(
            f"smolvlm_fms.hf.{name} needs transformers, which cannot be imported ({error}). "
            "Install it with: pip install 'smolvlm-fms[hf]'"
        ) from error
    return getattr(importlib.import_module(f"smolvlm_fms.hf.{_HOMES[name]}"), name)
