"""Merging a peft adapter into the checkpoint that it was trained on: LoRA matrices, and parts that were trained whole.

    adapter_config.json        which modules, how strong
    adapter_model.safetensors  base_model.model.NAME.lora_A.weight, .lora_B.weight      W ← W + s · B A
                               base_model.model.NAME.weight, .bias (modules_to_save)    W ← the tensor itself

Names are Hugging Face's, whether the adapter was trained here or with transformers; peft itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smolvlm_fms.errors import CheckpointError
from smolvlm_fms.fms_bridge.adapters import FAMILIES, names_step, rope_step, split
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.fms_bridge.saving import save_pretrained

__all__ = ["PREFIX", "adapter_base", "apply_adapter", "merge_adapter"]

PREFIX = "base_model.model."
"""What peft puts in front of every name in its files."""

REFUSED = ("use_dora", "alpha_pattern", "rank_pattern", "lora_bias", "fan_in_fan_out", "trainable_token_indices")
"""Settings of peft's that change what the matrices mean."""


def merge_adapter(base: str | Path, adapter: str | Path, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Merge a peft adapter (trained here, or with transformers) into its base checkpoint, and write that to ``folder``.

    base: a checkpoint folder or hub id; adapter: a folder with ``adapter_config.json`` and
    ``adapter_model.safetensors``. dtype: what is written (None: the base's own). Only the weights and config.json are
    written; the processor's files are the base's.

    Raises CheckpointError for an adapter of another model or kind.
    """
    model = load_model(base)
    apply_adapter(model, adapter)
    save_pretrained(model, folder, dtype=dtype)


def adapter_base(adapter: str | Path) -> str:
    """The checkpoint that an adapter belongs to, a folder or hub id, as its file says; raises CheckpointError."""
    base = _settings(Path(adapter)).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{adapter} does not say which checkpoint it belongs to; name its base.")
    return str(base)


@torch.no_grad()
def apply_adapter(model: Any, adapter: str | Path) -> None:
    """Merge a peft adapter into ``model``'s weights, fused or not, in place; each sum is formed in float32.

    Raises CheckpointError for an adapter of another model or kind; the weights are then as they were.
    """
    adapter = Path(adapter)
    family = FAMILIES[architecture_of(model.config.model_type).name]
    state = split(model.state_dict(), model.config)  # views of the model's own tensors
    ours = {to: name for name in state if (to := family.theirs(name)) is not None}
    changes = _changes(_settings(adapter), _tensors(adapter), adapter)
    for theirs, (change, _) in changes.items():
        name = ours.get(theirs)
        if name is None or change.shape != state[name].shape:
            what = "which it does not have" if name is None else f"whose shape there is {tuple(state[name].shape)}"
            raise CheckpointError(f"{adapter} does not belong to this model: it changes {theirs}, {what}.")
    for theirs, (change, is_whole) in changes.items():
        (value,) = names_step(family)(rope_step(family)({theirs: change}, model_config=model.config)).values()
        weight = state[ours[theirs]]
        value = value.to(weight.device)
        weight.copy_(value if is_whole else weight.float() + value)


def _settings(adapter: Path) -> dict[str, Any]:
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{adapter} is no peft adapter that can be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{adapter / 'adapter_config.json'} holds no settings of an adapter.")
    refused = [name for name in REFUSED if settings.get(name)]
    if settings.get("peft_type") != "LORA" or refused:
        kind = ", ".join(refused) or f"peft_type {settings.get('peft_type')}"
        raise CheckpointError(f"{adapter} is not a plain LoRA adapter ({kind}); only those can be merged.")
    return settings


def _tensors(adapter: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(adapter / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{adapter} is no peft adapter that can be read: {error}") from error
    return tensors


def _changes(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter: Any
) -> dict[str, tuple[Tensor, bool]]:
    """By Hugging Face name: what is added to a tensor (False), or what takes its place (True), in float32."""
    changes: dict[str, tuple[Tensor, bool]] = {}
    pairs = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    for module in pairs:
        down, up = tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")
        if down is None or up is None:
            raise CheckpointError(f"{adapter} holds half of a pair, or more than LoRA's matrices, for {module}.")
        rank = down.shape[0]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        changes[f"{module.removeprefix(PREFIX)}.weight"] = (up.float() @ down.float() * scale, False)
    whole = tuple(settings.get("modules_to_save") or ())
    for key, tensor in tensors.items():
        if ".lora_" in key:
            continue
        module = key.rpartition(".")[0].removeprefix(PREFIX)
        if not any(module == one or module.endswith(f".{one}") or f"{one}." in module for one in whole):
            raise CheckpointError(f"{adapter} holds {key}, which is neither LoRA's nor among its modules_to_save.")
        changes[key.removeprefix(PREFIX)] = (tensor.float(), True)
    return changes
