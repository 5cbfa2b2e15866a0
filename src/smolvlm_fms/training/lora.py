"""Low-rank adapters: peft trains them on our modules; on the disk they have Hugging Face's module names.

So an adapter trained here is loaded by peft onto transformers' model of the checkpoint, and one trained there is merged
here. Linears are unfused while adapters are trained (``fused_weights=False``), so that each has its counterpart. Parts
that are trained whole beside the adapters are peft's ``modules_to_save``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from smolvlm_fms.errors import ConfigurationError, MissingDependencyError
from smolvlm_fms.fms_bridge.adapters import FAMILIES, to_hf
from smolvlm_fms.fms_bridge.lora import PREFIX
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.training.config import LoraConfig
from smolvlm_fms.training.optimizer import part_of

__all__ = ["add_adapters", "fold_adapters", "save_adapter"]

TEXT_LINEARS = r"text_model\..*\.(query|key|value|dense|wg|w1|w2)"
NAME = "default"


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Wrap the chosen linears in adapters, which are then all that is trained, beside the parts in ``config.full``.

    Raises ConfigurationError where no linear is chosen, or one in a part that is trained whole.
    """
    peft = _peft()
    targets = config.targets or TEXT_LINEARS
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    try:
        peft.inject_adapter_in_model(settings, model, adapter_name=NAME)
    except ValueError as error:
        raise ConfigurationError(f"lora.targets {targets!r} matches no linear layer of the model: {error}") from error
    for name, _ in _layers(model):
        if part_of(name) in config.full:
            raise ConfigurationError(f"lora.targets matches {name}, but lora.full trains the {part_of(name)} whole.")
    for _, parameter in _whole(model, config):
        parameter.requires_grad_(True)


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads them for transformers' model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules, whole = {}, set(), set()
    for name, layer in _layers(model):
        theirs = _theirs(model, name)
        modules.add(theirs)
        down = layer.lora_A[NAME].weight.detach()
        # The rows of B are the rows of the weight: what reorders those for rotary positions reorders these.
        up = next(iter(_to_hf(model, {f"{name}.weight": layer.lora_B[NAME].weight.detach()}).values()))
        tensors[f"{PREFIX}{theirs}.lora_A.weight"] = down.contiguous().cpu()
        tensors[f"{PREFIX}{theirs}.lora_B.weight"] = up.contiguous().cpu()
    for theirs, tensor in _to_hf(model, {name: p.detach() for name, p in _whole(model, config)}).items():
        whole.add(theirs.rpartition(".")[0])
        tensors[f"{PREFIX}{theirs}"] = tensor.contiguous().cpu()
    settings = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": sorted(modules), "modules_to_save": sorted(whole) or None, "fan_in_fan_out": False,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def fold_adapters(model: nn.Module) -> None:
    """Add every adapter to the weights that it belongs to, and take the adapters away."""
    for name, layer in list(_layers(model)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    lora = _peft().tuners.lora
    return [(name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)]


def _whole(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the parts that are trained whole; peft saves modules, so not LLaVA-Next's ``image_newline``."""
    return [(name, p) for name, p in model.named_parameters() if part_of(name) in config.full and "." in name]


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


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise MissingDependencyError("LoRA needs peft: pip install 'smolvlm-fms[train]'.") from error
    return peft
