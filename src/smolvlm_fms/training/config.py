"""What a training run is told: one YAML file, every field checked, unknown names refused. Nothing here knows torch.

TrainConfig.load("train.yaml", ["optim.lr=1e-4", "steps=200"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolvlm_fms.errors import ConfigurationError

__all__ = ["CheckpointConfig", "EvalConfig", "LogConfig", "OptimConfig", "PartConfig", "TrainConfig"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class PartConfig(_Strict):
    """One of the model's three parts: trained or frozen, with a learning rate of its own (None: ``optim.lr``)."""

    train: bool = True
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimConfig(_Strict):
    """The optimizer and its schedule.

    kind: ``adamw``, or ``muon`` (torch's) for the matrices of the blocks beside AdamW for everything else, at the same
    learning rate (arXiv 2502.16982): fewer steps for a model that is trained from little; not for sharded runs.
    warmup: steps (≥ 1) or a fraction of all steps (< 1). schedule: ``cosine`` falls from the end of the warm-up to the
    end; ``wsd`` stays and falls linearly over the last ``decay`` fraction of the steps (arXiv 2404.06395);
    ``constant`` stays. min_lr: where the fall ends, as a fraction of the learning rate. clip: largest norm of the
    gradient (None: any). z_loss: weight of log Z squared (arXiv 2204.02311). ema: decay of the averaged weights that
    evaluation and ``final/`` then use (None: off).
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0)
    decay: float = Field(default=0.2, ge=0, le=1)
    min_lr: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=1.0, gt=0)
    z_loss: float = Field(default=0.0, ge=0)
    ema: float | None = Field(default=None, gt=0, lt=1)


class CheckpointConfig(_Strict):
    """every: steps between checkpoints (and ``minutes``, whichever comes first); keep: how many stay on the disk.

    asynchronous: distributed runs write while the next steps go on.
    """

    every: int = Field(default=500, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    keep: int = Field(default=2, ge=1)
    asynchronous: bool = True


class LogConfig(_Strict):
    """every: steps between lines of metrics.jsonl; bar: the progress bar.

    trackers: where else metrics go. None: TensorBoard's event files in the run folder, where that is installed.
    """

    every: int = Field(default=1, ge=1)
    bar: bool = True
    trackers: list[Literal["tensorboard", "wandb"]] | None = None


class EvalConfig(_Strict):
    """every: steps between evaluations (0: at the end only); max_new_tokens: length of sample generations.

    loss_samples, generations: how many held-out samples the loss and the generations (and exact match) look at.
    """

    every: int = Field(default=500, ge=0)
    loss_samples: int = Field(default=256, ge=0)
    generations: int = Field(default=8, ge=0)
    max_new_tokens: int = Field(default=48, ge=1)


class SourceConfig(_Strict):
    """One source of conversations; see ``training.sources`` for the kinds.

    weight: samples drawn from it, relative to the other sources (None: as many as it has; streams need one).
    images: where relative paths of pictures start (None: beside the data). split, subset: for ``datasets``.
    """

    path: str
    kind: Literal["jsonl", "parquet", "webdataset", "datasets", "stream"] | None = None
    weight: float | None = Field(default=None, gt=0)
    images: str | None = None
    split: str = "train"
    subset: str | None = None


class DataConfig(_Strict):
    """What is trained on, and how samples become micro-batches.

    max_length: tokens of a row. too_long: longer samples are dropped, cut at their end (never through a picture), or
    refused. packing: several samples share a row of ``max_length``, without seeing each other; else rows of similar
    length are batched and padded. rows: rows of a micro-batch. window: samples that are looked at together to pack or
    to sort them. workers: processes that read and tile ahead. image: options of the image processor (``size``,
    ``do_image_splitting``, ``detail`` …), also written into ``final/``.
    """

    train: list[SourceConfig] = Field(default_factory=list)
    eval: list[SourceConfig] = Field(default_factory=list)
    max_length: int = Field(default=2048, ge=8)
    too_long: Literal["drop", "cut", "refuse"] = "drop"
    packing: bool = True
    rows: int = Field(default=1, ge=1)
    window: int = Field(default=256, ge=1)
    workers: int = Field(default=1, ge=0)
    image: dict[str, Any] = Field(default_factory=dict)


class LoraConfig(_Strict):
    """Low-rank adapters (arXiv 2106.09685) by peft, in place of training the weights themselves.

    targets: a regular expression over our modules' names; the linear layers that it matches get one. None means every
    linear layer of the text backbone. full: parts whose own weights are trained as well, whole; the adapter's file
    holds them as peft's ``modules_to_save``.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | None = None
    full: list[Literal["tower", "connector"]] = []


class ParallelConfig(_Strict):
    """Under ``torchrun``: weights, gradients and moments are sharded over all processes (FSDP2).

    replicas: groups of processes that hold a whole model each (HSDP). tensor: processes that share each layer.
    """

    replicas: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)


class TrainConfig(_Strict):
    """A training run; the classes above explain the nested fields.

    run: the run folder. model: what is fine-tuned, a checkpoint folder or hub id. steps: optimizer steps (or ``epochs``
    over the data, which then decides). accumulate: micro-batches a step, over all processes together. precision:
    ``bfloat16`` computes under autocast and keeps weights in float32. activation_checkpointing: recompute activations
    in the backward pass. compile: ``torch.compile`` the blocks of tower and text. stop_after_minutes: write a
    checkpoint and stop; the same command goes on.
    """

    run: Path
    model: str | None = None
    steps: int = Field(default=1000, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    stop_after_minutes: float | None = Field(default=None, gt=0)
    tower: PartConfig = Field(default_factory=PartConfig)
    connector: PartConfig = Field(default_factory=PartConfig)
    text: PartConfig = Field(default_factory=PartConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)

    def __init__(self, **values: Any) -> None:
        """Raises ConfigurationError that names every field which is wrong."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_explain(error)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, then apply ``key.subkey=value`` overrides (values are YAML, too)."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigurationError(f"The training configuration {path} cannot be read: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise ConfigurationError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigurationError(f"{path} must hold a mapping of fields, not a {type(values).__name__}.")
        for override in overrides:
            _override(values, override)
        return cls(**values)

    def dump(self) -> str:
        """The configuration as YAML, every field written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in ``values``; a number names an item of a list (``data.train.0.weight=2``)."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"An override is written key=value, such as optim.lr=1e-4; {override!r} came.")
    *parents, last = key.split(".")
    target: Any = values
    try:
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else target.setdefault(name, {})
        target[int(last) if isinstance(target, list) else last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"The value of the override {override!r} is not YAML: {error}") from None
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        raise ConfigurationError(f"The override {override!r} names no place in the configuration.") from None


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"])) or "the configuration"
        if problem["type"] == "extra_forbidden":
            lines.append(f"there is no field {place}")
        elif problem["type"] == "missing":
            lines.append(f"the field {place} is missing")
        else:
            lines.append(f"{place} = {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return "The training configuration is wrong: " + "; ".join(lines) + "."
