"""Where this package meets FMS: registries, checkpoints, state-dict steps. Importing this imports no FMS, no torch.

FMS has no plug-in mechanism, and ``import smolvlm_fms`` must stay quick, so registration happens at the moment that
somebody imports ``fms.models`` (at once where that has happened already).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_with_fms"]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``callback`` once, after the module ``name`` has been executed; then gets out of the way."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _after_import(name: str, callback: Callable[[], None]) -> None:
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback()
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, callback))


def _register_models() -> None:
    from smolvlm_fms.fms_bridge.register import register_models

    register_models()


def _register_configurations() -> None:
    from smolvlm_fms.fms_bridge.register import register_configurations

    register_configurations()


def register_with_fms() -> None:
    """Make every variant known to ``fms.models.get_model``, now or as soon as FMS is imported. Idempotent."""
    _after_import("fms.models", _register_models)
    _after_import("fms.models.hf.config_utils", _register_configurations)
