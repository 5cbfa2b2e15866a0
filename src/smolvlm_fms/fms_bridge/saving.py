"""From a model to a checkpoint folder: Hugging Face's names and layout, or FMS's own."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from smolvlm_fms.errors import CheckpointError
from smolvlm_fms.fms_bridge.adapters import FAMILIES, HEAD, to_hf
from smolvlm_fms.fms_bridge.register import architecture_of

__all__ = ["hf_state_dict", "save_pretrained"]

INDEX = "model.safetensors.index.json"


def hf_state_dict(model: Any) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names and in its layout. Most share memory with the model's."""
    return to_hf(FAMILIES[architecture_of(model.config.model_type).name], model.state_dict(), model.config)


def save_pretrained(
    model: Any, folder: str | Path, *, source: str = "hf", max_shard_size: int | str = "5GB", dtype: Any = None
) -> None:
    """Write ``config.json`` and the weights (``model.safetensors``, or shards and an index) into ``folder``.

    source: ``"hf"`` for a checkpoint that transformers and ``load_model`` read; ``"fms"`` for our modules' own names
    and layout. max_shard_size: bytes, or text such as ``"5GB"``. dtype: to convert floating-point tensors to.

    Files are written beside their places and moved there when complete, so a checkpoint is never half overwritten,
    not even the one that the model's own weights are mapped from. Raises CheckpointError.
    """
    if source not in ("hf", "fms"):
        raise CheckpointError(f"Unknown source {source!r}; a checkpoint is written as 'hf' or 'fms'.")
    if getattr(model, "vision_only", False):
        raise CheckpointError("This model was built with vision_only=True; a checkpoint needs all its parts.")
    state = hf_state_dict(model) if source == "hf" else _own_state_dict(model)
    lost = [name for name, tensor in state.items() if tensor.is_meta]
    if lost:
        raise CheckpointError(f"{len(lost)} tensors have no values (meta device), the first {lost[0]}.")
    if dtype is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    values = model.config.updated(dtype=str(floats[0]).removeprefix("torch.")).to_hf()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(state, folder, max_shard_size)
        _write(folder / "config.json", json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"The checkpoint could not be written to {folder}: {error}") from error


def _own_state_dict(model: Any) -> dict[str, Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == HEAD)}


def _write_weights(state: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: state[name].detach().contiguous() for name in names}
            save_file(tensors, Path(scratch) / file, metadata={"format": "pt"})
        for file in plan.filename_to_tensors:
            os.replace(Path(scratch) / file, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write(folder / INDEX, json.dumps(index, indent=2) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name not in plan.filename_to_tensors:
            old.unlink()


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
