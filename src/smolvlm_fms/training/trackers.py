"""Where metrics go besides metrics.jsonl: TensorBoard's event files, Weights & Biases."""

from __future__ import annotations

import hashlib
import html
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

from smolvlm_fms.errors import MissingDependencyError
from smolvlm_fms.training.config import TrainConfig

__all__ = ["Tracker", "open_trackers"]


class Tracker(Protocol):
    """Takes the metrics of a step, and what the model said at an evaluation."""

    def log(self, step: int, metrics: Mapping[str, Any], generations: list[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder, for ``tensorboard --logdir``; a resumed run hides what it does again."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                "log.trackers: tensorboard is not installed: pip install 'smolvlm-fms[train]'."
            ) from error
        self.writer = SummaryWriter(str(config.run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, Any], generations: list[Mapping[str, Any]]) -> None:
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
        for number, one in enumerate(generations[:8]):
            self.writer.add_text(
                f"generation/{number}", f"wanted: {one.get('wanted')}  \nsaid: {one.get('said')}", step
            )

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of that name, taken up again under the same id."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise MissingDependencyError(
                "log.trackers: wandb is not installed: pip install 'smolvlm-fms[wandb]'."
            ) from error
        self.html = wandb.Html
        # The id is the folder's: two runs of one name in different places are two runs.
        digest = hashlib.sha256(str(config.run.resolve()).encode()).hexdigest()[:8]
        self.run: Any = wandb.init(
            project="smolvlm-fms", name=config.run.name, id=f"{config.run.name}-{digest}", resume="allow",
            dir=str(config.run), config=config.model_dump(mode="json"),
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, Any], generations: list[Mapping[str, Any]]) -> None:
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        for number, one in enumerate(generations[:8]):
            words = f"wanted: {one.get('wanted')}\nsaid: {one.get('said')}"
            numbers[f"generation/{number}"] = self.html(f"<pre>{html.escape(words)}</pre>")
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


def open_trackers(config: TrainConfig, step: int) -> list[Tracker]:
    """The trackers that ``log.trackers`` names; raises MissingDependencyError before the first step."""
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    if config.log.trackers is None:
        return [TensorBoard(config, step)] if importlib.util.find_spec("tensorboard") is not None else []
    return [kinds[name](config, step) for name in config.log.trackers]
