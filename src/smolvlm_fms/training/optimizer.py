"""What is trained, how fast: parameter groups by part of the model, the schedule, the averaged weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smolvlm_fms.errors import ConfigurationError, TrainingError
from smolvlm_fms.training.config import OptimConfig, PartConfig, TrainConfig
from smolvlm_fms.training.tensor import by_mesh

__all__ = [
    "PARTS",
    "Average",
    "Optimizer",
    "build_optimizer",
    "freeze",
    "moments",
    "part_of",
    "rate_at",
    "set_rate",
    "trainable",
]

PARTS = {
    "vision_tower.": "tower", "connector.": "connector", "projector.": "connector", "image_newline": "connector",
    "text_model.": "text",
}  # fmt: skip
"""Where the parts of a model live in its state dict, and what the configuration calls them."""


def part_of(name: str) -> str:
    """The part (tower, connector or text) that a parameter belongs to."""
    for prefix, part in PARTS.items():
        if f".{prefix}" in f".{name}":
            return part
    return "text"


def freeze(model: nn.Module, config: TrainConfig) -> None:
    """Turn gradients off in the parts that the configuration freezes; raises TrainingError if nothing is left."""
    for name, parameter in model.named_parameters():
        part: PartConfig = getattr(config, part_of(name))
        if not part.train:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("Nothing is left to train: tower, connector and text are frozen. Set one's train: true.")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class MuonWithAdamW:
    """Muon for some parameters and AdamW for the others, in the shape of one optimizer: groups, state, step."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.both: tuple[torch.optim.Optimizer, ...] = muon, adamw
        self.matrices = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
        self.param_groups = [*muon.param_groups, *adamw.param_groups]
        self.state = muon.state = adamw.state

    def step(self) -> None:
        for one in self.both:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.both:
            one.zero_grad(set_to_none)


Optimizer = torch.optim.AdamW | MuonWithAdamW


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """Names of what the optimizer remembers of a parameter."""
    if isinstance(optimizer, MuonWithAdamW) and id(parameter) in optimizer.matrices:
        return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Groups for each part, kind of decay and mesh; norms, biases and embeddings do not decay.

    Raises ConfigurationError for Muon where weights are sharded, or where nothing is trained that it is for.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[str, bool, bool, Any], list[Tensor]] = {}
    for name, parameter in trainable(model).items():
        decays = parameter.ndim >= 2 and id(parameter) not in tables
        turned = config.optim.kind == "muon" and parameter.ndim == 2 and ".layers." in name and "lora" not in name
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        if turned and mesh is not None:
            raise ConfigurationError("optim.kind is muon, which needs whole matrices; sharded runs take adamw.")
        groups.setdefault((part_of(name), decays, turned, mesh), []).append(parameter)
    optim = config.optim
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for (part, decays, turned, _), parameters in groups.items():
        settings: PartConfig = getattr(config, part)
        decay = optim.weight_decay if settings.weight_decay is None else settings.weight_decay
        rate = optim.lr if settings.lr is None else settings.lr
        (matrices if turned else others).append({
            "params": parameters, "part": part, "base_lr": rate, "lr": rate, "weight_decay": decay if decays else 0.0,
        })  # fmt: skip
    if not matrices and optim.kind == "muon":
        raise ConfigurationError(
            "optim.kind is muon, which is for the matrices of tower and text, and none of them is trained: adapters "
            "(LoRA) and the connector take adamw."
        )
    if not matrices:
        return torch.optim.AdamW(others, betas=optim.betas, eps=optim.eps, fused=True)
    # "match_rms_adamw": steps as large as AdamW's, so that its learning rates serve both.
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, torch.optim.AdamW(others, betas=optim.betas, eps=optim.eps, fused=True))


def rate_at(step: int, steps: int, optim: OptimConfig) -> float:
    """Factor on the learning rate at ``step`` (1 … steps): a linear rise, then the schedule's fall to ``min_lr``."""
    warmup = optim.warmup if optim.warmup >= 1 else round(optim.warmup * steps)
    if step <= warmup:
        return step / (warmup + 1)
    start = warmup if optim.schedule == "cosine" else max(warmup, steps * (1 - optim.decay))
    if optim.schedule == "constant" or step <= start:
        return 1.0
    done = min(1.0, (step - start) / max(1e-9, steps + 1 - start))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.min_lr + (1 - optim.min_lr) * fall


def set_rate(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Apply the schedule's factor to every group; returns each part's learning rate."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        rates[group["part"]] = group["lr"]
    return rates


class Average:
    """Exponential moving average of the trained weights, in their own dtype."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step``; early steps count more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = by_mesh(p.detach() for p in trainable(model).values())
        for held, fresh in zip(by_mesh(self.weights.values()), live, strict=True):
            torch._foreach_lerp_(held, fresh, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the averaged ones; a second call changes them back."""
        for name, parameter in trainable(model).items():
            held = self.weights[name].clone()
            self.weights[name].copy_(parameter)
            parameter.copy_(held)
