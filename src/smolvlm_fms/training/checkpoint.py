"""Checkpoints of a run: written beside, then renamed, so that the newest complete one is always good.

    checkpoints/step-0000500/state.safetensors     trained weights, optimizer moments, averages (or DCP's shards)
    checkpoints/step-0000500/state.json            step, fingerprint of the frozen weights; written last
    checkpoints/.writing-step-0000500/             what a dying process leaves behind (or .removing-…); removed at the
                                                   next start

Frozen weights are not written: they come from the model that the run started from, and the fingerprint proves it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smolvlm_fms.errors import TrainingError

__all__ = ["CheckpointFolder", "fingerprint", "write_atomically"]


class CheckpointFolder:
    """The ``checkpoints`` folder of a run; keeps the newest ``keep``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if (path / "state.json").exists())

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is or will be."""
        return self.folder / f"step-{step:07d}"

    def staging(self, step: int) -> Path:
        """A fresh folder to write the checkpoint of ``step`` into."""
        self.clean()
        staging = self.folder / f".writing-step-{step:07d}"
        staging.mkdir(parents=True)
        return staging

    def clean(self) -> None:
        """Remove what an interrupted write left."""
        for pattern in (".writing-*", ".removing-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write a checkpoint of one process; raises OSError (disk full …) and leaves older ones as they were."""
        try:
            staging = self.staging(step)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / "state.safetensors")
            return self.commit(step, facts)
        except SafetensorError as error:
            self.clean()
            raise OSError(f"the weights could not be written: {error}") from error
        except OSError:
            self.clean()
            raise

    def commit(self, step: int, facts: Mapping[str, Any]) -> Path:
        """Make the staged checkpoint of ``step`` the newest one, and let go of the oldest."""
        staging, path = self.folder / f".writing-step-{step:07d}", self.path(step)
        (staging / "state.json").write_text(json.dumps(dict(facts), indent=1), encoding="utf-8")
        for file in staging.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            self._remove(path)
        os.rename(staging, path)
        _sync(self.folder)
        for old in self.steps()[: -self.keep]:
            self._remove(self.path(old))
        return path

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; it stops counting at once, so half of one is never left under its name."""
        doomed = self.folder / f".removing-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def facts(self, step: int) -> dict[str, Any]:
        """What ``state.json`` of ``step`` says."""
        facts: dict[str, Any] = json.loads((self.path(step) / "state.json").read_text(encoding="utf-8"))
        return facts

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of ``step``, from the file's header."""
        shapes = {}
        with self._opened(step) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dictionary
                if name.startswith("weights/"):
                    shapes[name.removeprefix("weights/")] = tuple(file.get_slice(name).get_shape())
        return shapes

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Tensors of ``step``; raises TrainingError for a file that is damaged."""
        with self._opened(step) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @contextlib.contextmanager
    def _opened(self, step: int) -> Iterator[Any]:
        file = self.path(step) / "state.safetensors"
        try:
            with safe_open(file, "pt") as handle:
                yield handle
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"The checkpoint {file.parent} cannot be read ({error}). Delete that folder to go on from an older one."
            ) from error


def fingerprint(model: nn.Module) -> str:
    """A short hash of the weights that are not trained, from a few values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 16)].double().cpu()
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one move, so that a reader sees the old or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    beside.write_text(text, encoding="utf-8")
    _sync(beside)
    os.replace(beside, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
