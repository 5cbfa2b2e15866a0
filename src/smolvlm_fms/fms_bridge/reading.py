"""``get_model``'s way to a checkpoint: FMS's own reader, with our loader's refusal of pickles and its audit of tensors.

FMS reads before it says for which architecture, so what was read carries where it comes from, and the check stands
where the tensors are about to be placed. A folder whose config.json names one of our models is refused before that:
none of its pickles is opened. Other architectures keep FMS's behaviour.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fms.utils import serialization

from smolvlm_fms.errors import ConfigurationError, UnsafeCheckpointError

__all__ = ["guard_reader"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def guard_reader() -> None:
    """Put the two checks into FMS's reader. Idempotent."""
    if not isinstance(serialization.load_state_dict, _Reader):
        serialization.load_state_dict = _Reader(serialization.load_state_dict)
        serialization.load_state_dict_into_model = _Placer(serialization.load_state_dict_into_model)


class _Read(ChainMap[str, Any]):
    """What FMS's reader returns, and the path that it was given."""

    path: Path | None = None

    @property
    def is_lazy(self) -> bool:
        """Whether all of it lies in safetensors files; the rest was unpickled."""
        return all(isinstance(part, serialization.LazySafetensorsDict) for part in self.maps)


class _Reader:
    """FMS's ``load_state_dict``."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, model_path: Any, **options: Any) -> Any:
        if model_path is None:
            return self.original(model_path, **options)
        path = Path(str(model_path).partition("*")[0]).expanduser()
        if _has_only_pickles(path, str(model_path)) and _is_ours(path):
            raise _refusal(path)
        state = self.original(model_path, **options)
        if isinstance(state, ChainMap) and not isinstance(state, _Read):
            state = _Read(*state.maps)
            state.path = path
        return state


class _Placer:
    """FMS's ``load_state_dict_into_model``."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, model: Any, state_dict: Any, architecture: str, source: str | None, **options: Any) -> Any:
        from smolvlm_fms.fms_bridge.register import ARCHITECTURES

        if architecture in ARCHITECTURES and isinstance(state_dict, _Read):
            if not state_dict.is_lazy:
                raise _refusal(state_dict.path)
            # Where processes share the weights, a model's parameters are not the checkpoint's shapes.
            if options.get("distributed_strategy") in (None, "", "mp"):
                _audit(model, state_dict, architecture, source)
        return self.original(model=model, state_dict=state_dict, architecture=architecture, source=source, **options)


def _audit(model: Any, state: _Read, architecture: str, source: str | None) -> None:
    """Names and shapes both ways, as ``load_model`` compares them; raises CheckpointError."""
    from smolvlm_fms.fms_bridge.adapters import FAMILIES, canonical_name
    from smolvlm_fms.fms_bridge.loading import Checkpoint, Entry, audited, format_of

    held = "hf" if source == "hf" else "fms"
    if format_of(state) != held:
        return  # the adapter says so
    family = FAMILIES[architecture]
    folder = state.path or Path()
    entries = {}
    for raw in state:
        name = raw if held == "fms" else canonical_name(family, raw)
        if name is not None:
            # Through the lazy entry itself: what __getitem__ reads stays in memory.
            read = next(part.data[raw] for part in state.maps if raw in part.data)  # type: ignore[attr-defined]
            tensor = read() if callable(read) else read
            entries[name] = Entry(folder, raw, tuple(tensor.shape), tensor.dtype)
    audited(model, family, model.config, Checkpoint(folder, held, entries), bool(model.vision_only))


def _has_only_pickles(path: Path, asked: str) -> bool:
    """Whether FMS would unpickle what it finds at ``path``, asked for by name or by a pattern."""
    if path.is_file() or "*" in asked:
        return asked.endswith(PICKLES)
    return path.is_dir() and not any(path.glob("*.safetensors")) and any(p.suffix in PICKLES for p in path.iterdir())


def _is_ours(path: Path) -> bool:
    """Whether a configuration beside the weights names one of our architectures."""
    from smolvlm_fms.config import read_json_config
    from smolvlm_fms.fms_bridge.register import architecture_of

    try:
        architecture_of(read_json_config(path if path.is_dir() else path.parent).get("model_type"))
    except ConfigurationError:
        return False
    return True


def _refusal(path: Path | None) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{path} holds its weights as pickles, which can run code when opened. Convert them to safetensors first, or "
        "take a revision of the model that has them."
    )
