"""Low-rank adapters: peft trains them on our modules; on the disk they have Hugging Face's module names.

So an adapter trained here is loaded by peft onto transformers' model of the checkpoint, and one trained there is merged
here. Linears are unfused while adapters are trained (``fused_weights=False``), so that each has its counterpart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smolvlm_fms.errors import CheckpointError, ConfigurationError, MissingDependencyError
from smolvlm_fms.fms_bridge.adapters import FAMILIES, to_hf
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.training.config import LoraConfig

__all__ = ["add_adapters", "fold_adapters", "merge_adapter", "save_adapter"]

TEXT_LINEARS = r"text_model\..*\.(query|key|value|dense|wg|w1|w2)"
NAME = "default"
PREFIX = "base_model.model."
"""What peft puts in front of every name in its files."""


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Wrap the chosen linears in adapters, which are then all that is trained."""
    peft = _peft()
    targets = config.targets or TEXT_LINEARS
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    try:
        peft.inject_adapter_in_model(settings, model, adapter_name=NAME)
    except ValueError as error:
        raise ConfigurationError(f"lora.targets {targets!r} matches no linear layer of the model: {error}") from error


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads them for transformers' model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for name, layer in _layers(model):
        theirs = _theirs(model, name)
        modules.add(theirs)
        down = layer.lora_A[NAME].weight.detach()
        # The rows of B are the rows of the weight: what reorders those for rotary positions reorders these.
        up = next(iter(_to_hf(model, {f"{name}.weight": layer.lora_B[NAME].weight.detach()}).values()))
        tensors[f"{PREFIX}{theirs}.lora_A.weight"] = down.contiguous().cpu()
        tensors[f"{PREFIX}{theirs}.lora_B.weight"] = up.contiguous().cpu()
    settings = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": sorted(modules), "fan_in_fan_out": False,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def fold_adapters(model: nn.Module) -> None:
    """Add every adapter to the weights that it belongs to, and take the adapters away."""
    for name, layer in list(_layers(model)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())


def merge_adapter(base: str | Path, adapter: str | Path, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Merge a peft adapter (trained here, or with transformers) into its base checkpoint, and write that to ``folder``.

    Only the weights and config.json are written. Raises CheckpointError for an adapter of another model or kind.
    """
    adapter = Path(adapter)
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{adapter} is no peft adapter that can be read: {error}") from error
    if settings.get("peft_type") != "LORA" or settings.get("use_dora") or settings.get("alpha_pattern"):
        raise CheckpointError(f"{adapter} is not a plain LoRA adapter; only those can be merged.")
    model = load_model(base, fused_weights=False)
    kept = next(model.parameters()).dtype
    model = model.float()
    state, config = model.state_dict(), model.config
    family = FAMILIES[architecture_of(config.model_type).name]
    ours = {to: name for name in state if (to := family.theirs(name)) is not None}
    changed = 0
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        theirs = key.removeprefix(PREFIX).removesuffix(".lora_A.weight") + ".weight"
        if theirs not in ours:
            raise CheckpointError(f"{adapter} changes {theirs}, which {base} does not have.")
        up = tensors[key.replace(".lora_A.", ".lora_B.")].float()
        rank = down.shape[0]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        delta = _from_hf(family, config, {theirs: up @ down.float() * scale})
        state[ours[theirs]].add_(delta)
        changed += 1
    if 2 * changed != len(tensors):
        other = [key for key in tensors if ".lora_A." not in key and ".lora_B." not in key]
        raise CheckpointError(f"{adapter} holds more than LoRA matrices: {', '.join(other[:3])}.")
    save_pretrained(model, folder, dtype=dtype or kept)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    lora = _peft().tuners.lora
    return [(name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)]


def _theirs(model: Any, name: str) -> str:
    family = FAMILIES[architecture_of(model.config.model_type).name]
    theirs = family.theirs(f"{name}.weight")
    if theirs is None:
        raise ConfigurationError(
            f"The adapter of {name} has no counterpart in Hugging Face's model; leave that layer out of lora.targets, "
            "and load the model with fused_weights=False."
        )
    return theirs.removesuffix(".weight")


def _to_hf(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_hf(FAMILIES[architecture_of(model.config.model_type).name], state, model.config)


def _from_hf(family: Any, config: Any, state: dict[str, Tensor]) -> Tensor:
    from smolvlm_fms.fms_bridge.adapters import names_step, rope_step

    (tensor,) = names_step(family)(rope_step(family)(state, model_config=config)).values()
    return tensor


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise MissingDependencyError("LoRA needs peft: pip install 'smolvlm-fms[train]'.") from error
    return peft
