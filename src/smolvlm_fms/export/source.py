"""What is converted: a checkpoint folder, a hub id, the bundled model, a training run, or an adapter on its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolvlm_fms.bundle import folder_of
from smolvlm_fms.errors import CheckpointError
from smolvlm_fms.fms_bridge.loading import load_model, resolve_folder
from smolvlm_fms.fms_bridge.lora import adapter_base, apply_adapter

__all__ = ["Source", "find_source"]


@dataclass(frozen=True)
class Source:
    """A checkpoint ``folder`` and the LoRA adapter to merge into it, if any."""

    folder: Path
    adapter: Path | None = None

    def load(self, dtype: torch.dtype | None = None, progress: Callable[[float], None] | None = None) -> Any:
        """The model, adapter merged, in ``dtype`` (None: the checkpoint's own)."""
        model = load_model(self.folder, dtype=dtype, progress=progress)
        if getattr(model.config, "linear_config", None) is not None:
            raise CheckpointError(f"{self.folder} holds quantised linears of FMS's, which cannot be converted.")
        if self.adapter is not None:
            apply_adapter(model, self.adapter)
        return model


def find_source(model: str | Path, adapter: str | Path | None = None) -> Source:
    """Find out what ``model`` is.

    A folder written by ``smolvlm train`` stands for its ``final/``; a folder with an adapter and no weights for its
    base with that adapter merged. Raises FetchError or CheckpointError.
    """
    found = Path(folder_of(model)).expanduser()
    extra = None if adapter is None else _adapter_folder(Path(adapter).expanduser())
    if found.is_dir() and (found / "adapter_config.json").is_file() and not any(found.glob("model*.safetensors")):
        if extra is not None:
            raise CheckpointError(f"{found} is an adapter itself; give its base and one adapter.")
        return Source(resolve_folder(folder_of(adapter_base(found))), found)
    if found.is_dir() and not (found / "config.json").is_file() and (found / "config.yaml").is_file():
        if not (found / "final" / "config.json").is_file():
            raise CheckpointError(f"{found} is a training run that has not finished: there is no {found / 'final'}.")
        found = found / "final"
    folder = resolve_folder(folder_of(model)) if not found.is_dir() else found
    return Source(folder, extra)


def _adapter_folder(folder: Path) -> Path:
    """The adapter itself, also where its training run's folder was named."""
    for place in (folder, folder / "adapter", folder / "final" / "adapter"):
        if (place / "adapter_config.json").is_file():
            return place
    raise CheckpointError(f"There is no adapter_config.json in {folder}; an adapter is a folder that peft has written.")
