"""What a checkpoint holds, and how it gets to the disk and back: one file of one process, or shards of many.

Shards are written by ``torch.distributed.checkpoint`` while training goes on, and read back by any number of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor, distribute_tensor

from smolvlm_fms.errors import TrainingError
from smolvlm_fms.training.checkpoint import CheckpointFolder
from smolvlm_fms.training.optimizer import Average, Optimizer, moments, trainable
from smolvlm_fms.training.parallel import Group

__all__ = ["Snapshot"]


class Snapshot:
    """The state of a run: trained weights, the optimizer's moments, averages."""

    def __init__(
        self,
        folder: CheckpointFolder,
        model: nn.Module,
        optimizer: Optimizer,
        average: Average | None,
        group: Group,
        asynchronous: bool = False,
    ) -> None:
        self.folder = folder
        self.parameters = trainable(model)
        self.optimizer = optimizer
        self.average = average
        self.group = group
        self.asynchronous = asynchronous and group.world > 1
        # Its own group: what is written in the background must not be mixed up with the training's own exchanges.
        self.background = dist.new_group(backend="gloo") if self.asynchronous else None
        self._writing: tuple[int, Mapping[str, Any], Any] | None = None

    def save(self, step: int, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, or begin to; raises OSError and leaves older ones as they were."""
        self.finish()
        if self.group.world == 1:
            self.folder.save(step, self._tensors(), facts)
            return
        staging = self.folder.folder / f".writing-step-{step:07d}"
        if self.group.is_first:
            self.folder.staging(step)
        self.group.wait()
        if self.asynchronous:
            future = state_dict_saver.async_save(self._tensors(), checkpoint_id=staging, process_group=self.background)
            self._writing = (step, facts, future)
            return
        self._written(lambda: state_dict_saver.save(self._tensors(), checkpoint_id=staging))
        if self.group.is_first:
            self.folder.commit(step, facts)
        self.group.wait()

    def finish(self, wait: bool = True) -> None:
        """Make the checkpoint count that is being written in the background, if it is there (or wait for it).

        The first process knows that it is there: DCP's coordinator ends after all others have written.
        """
        if self._writing is not None and (wait or self._writing[2].done()):
            (step, facts, future), self._writing = self._writing, None
            self._written(future.result)
            if self.group.is_first:
                self.folder.commit(step, facts)
        if wait and self.asynchronous:
            self.group.wait()

    def restore(self, step: int) -> None:
        """Bring back the state of ``step``, written by any number of processes."""
        path = self.folder.path(step)
        sharded = (path / ".metadata").exists()
        try:
            tensors = self._read_shards(path) if sharded else self.folder.tensors(step)
        except (CheckpointException, OSError) as error:
            raise TrainingError(
                f"The checkpoint {path} cannot be read ({error}). Delete that folder to go on from an older one."
            ) from error
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                _put(parameter, tensors[f"weights/{name}"])
                wanted = moments(self.optimizer, parameter)
                found = {m: tensors[f"{m}/{name}"] for m in wanted if f"{m}/{name}" in tensors}
                if found:
                    self.optimizer.state[parameter] = {
                        m: t if m == "step" else _put(torch.empty_like(parameter), t) for m, t in found.items()
                    }
                if self.average is not None and f"average/{name}" in tensors:
                    _put(self.average.weights[name], tensors[f"average/{name}"])

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights in the checkpoint of ``step``."""
        path = self.folder.path(step)
        if (path / ".metadata").exists():
            known = FileSystemReader(path).read_metadata().state_dict_metadata
            return {n[8:]: tuple(getattr(m, "size", ())) for n, m in known.items() if n.startswith("weights/")}
        return self.folder.shapes(step)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weights/{name}"] = parameter.detach()
            state = self.optimizer.state.get(parameter) or {}
            kept = (moment for moment in moments(self.optimizer, parameter) if moment in state)
            tensors |= {f"{moment}/{name}": state[moment] for moment in kept}
        if self.average is not None:
            tensors |= {f"average/{name}": weight for name, weight in self.average.weights.items()}
        return tensors

    def _read_shards(self, path: Path) -> dict[str, Tensor]:
        """Tensors of a sharded checkpoint, laid out as this process needs them."""
        known = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for key in known:
            kind, _, name = key.partition("/")
            if name in self.parameters:
                step = torch.zeros((), dtype=torch.float32)
                tensors[key] = step if kind == "step" else torch.empty_like(self.parameters[name].detach())
        with warnings.catch_warnings():
            # One process may well read what many have written; DCP remarks on that.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            state_dict_loader.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        return tensors

    def _written(self, write: Any) -> None:
        try:
            write()
        except CheckpointException as error:
            first = next(iter(error.failures.values()))
            if self.group.is_first:
                self.folder.clean()
            raise OSError(
                f"process {next(iter(error.failures))}: {first[0] if isinstance(first, tuple) else first}"
            ) from error


def _put(target: Tensor, value: Tensor) -> Tensor:
    """Copy ``value`` into ``target``, sharding it where ``target`` is sharded."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.detach().copy_(value)
    return target
