"""The training loop.

stream ─▶ micro-batches of a step ─▶ forward · loss on target tokens ─▶ backward ─┐  × accumulate
                                                                                ▼
metrics.jsonl ◀─ loss, norm, rates ◀─ AdamW ◀─ learning rate ◀─ clip ◀─ gradients are finite?
                                        ▼
                  averages, evaluation, checkpoint: each when its step comes
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from smolvlm_fms.errors import CheckpointError, ConfigurationError, TrainingError
from smolvlm_fms.training.batches import Batches
from smolvlm_fms.training.checkpoint import CheckpointFolder, fingerprint, write_atomically
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.evaluate import model_inputs
from smolvlm_fms.training.flops import batch_flops, peak_flops
from smolvlm_fms.training.loss import shifted_targets, token_loss
from smolvlm_fms.training.optimizer import Average, build_optimizer, freeze, rate_at, set_rate, trainable
from smolvlm_fms.training.parallel import Group, blank_copy, check_parallel, reshard, shard, whole_model, with_tiles
from smolvlm_fms.training.progress import Bar, JsonLines
from smolvlm_fms.training.samples import IGNORE, Batch, to_device
from smolvlm_fms.training.snapshot import Snapshot
from smolvlm_fms.training.tensor import clip_over_meshes
from smolvlm_fms.training.trackers import open_trackers

__all__ = ["TrainResult", "Trainer"]

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module, int], Mapping[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``Trainer.run`` ended: the last step done, whether all are done, its loss, and ``final/``."""

    step: int
    finished: bool
    loss: float | None
    final: Path | None


class Trainer:
    """Trains ``model`` on ``batches``; see the package's docstring for the seam and the run folder.

    evaluate: called as ``evaluate(model, step)`` in eval mode, without gradients, with the averaged weights if there
    are any; returns numbers (logged as they are) and, under ``generations``, a list of objects for samples.jsonl.
    save_final: called as ``save_final(model, folder)`` after the last step; None leaves ``final/`` out.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        batches: Batches,
        *,
        evaluate: Evaluate | None = None,
        save_final: Callable[[nn.Module, Path], object] | None = None,
        group: Group | None = None,
    ) -> None:
        self.config = config
        group = group or Group(device=pick_device(config.device))
        if config.compile and config.parallel.tensor > 1:  # torch 2.13 cannot trace split weights of changing shapes
            raise ConfigurationError("compile and parallel.tensor do not go together; leave one of them out.")
        check_parallel(group.world, config.parallel)
        self.group = dataclasses.replace(group, tensor=config.parallel.tensor)
        if config.accumulate % self.group.readers:
            raise ConfigurationError(
                f"accumulate counts the micro-batches of a step over all processes, so {self.group.readers} of them "
                f"must divide it; it is {config.accumulate}."
            )
        self.batches = batches
        self.evaluate = evaluate
        self.save_final = save_final
        self.model: Any = model.to(self.group.device)
        freeze(model, config)
        _set_activation_checkpointing(model, config.activation_checkpointing)
        self.frozen = fingerprint(model)
        self.blank: nn.Module | None = None
        if self.group.world > 1:
            self.blank = blank_copy(model)
        if config.compile:
            _compile_blocks(model)
        if self.group.world > 1:
            shard(model, self.group, config.parallel, config.precision == "bfloat16")
        self.optimizer = build_optimizer(model, config)
        self.average = Average(model, config.optim.ema) if config.optim.ema else None
        self.masked = config.compile or self.group.device.type != "cpu"
        self.checkpoints = CheckpointFolder(config.run / "checkpoints", config.checkpoint.keep)
        self.snapshot = Snapshot(
            self.checkpoints, model, self.optimizer, self.average, self.group, config.checkpoint.asynchronous
        )
        self.step = 0
        self.loss: float | None = None
        self._saved_step = -1
        self._stop = False
        self._shown: list[Mapping[str, Any]] = []

    def run(self) -> TrainResult:
        """Train from the newest checkpoint, or from the start, to the end.

        Raises TrainingError for a loss that is not finite (a checkpoint of the last good step is written first), and
        for a run folder that another process uses, or that belongs to another model or configuration.
        """
        run = self.config.run
        run.mkdir(parents=True, exist_ok=True)
        with _only_one(run, self.group), self._signals():
            self.resume()
            if self.group.is_first:
                write_atomically(run / "config.yaml", self.config.dump())
            self._open_logs()
            try:
                self._loop()
            finally:
                self.bar.close()
                self._close_trackers()
            final = run / "final"
            if self.step == self.config.steps and self.save_final is not None and not final.exists():
                self._write_final(final)
            return TrainResult(self.step, self.step == self.config.steps, self.loss, final if final.exists() else None)

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; returns its step (0: none)."""
        if self.group.is_first:
            self.checkpoints.clean()
        steps = self.checkpoints.steps()
        if steps:
            self._check(steps[-1])
            self.snapshot.restore(steps[-1])
            self.step = self._saved_step = steps[-1]
            self.loss = self.checkpoints.facts(steps[-1])["loss"]
        return self.step

    def _open_logs(self) -> None:
        run, first = self.config.run, self.group.is_first
        self.bar = Bar(self.config.steps, self.step, self.config.log.bar and first)
        self.metrics = JsonLines(run / "metrics.jsonl", self.step) if first else None
        self.generations = JsonLines(run / "samples.jsonl", self.step) if first else None
        self.trackers = open_trackers(self.config, self.step) if first else []

    def _close_trackers(self) -> None:
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                logger.error("%s could not be closed: %s. metrics.jsonl has all.", type(tracker).__name__, error)

    def _loop(self) -> None:
        config, started, saved_at = self.config, time.monotonic(), time.monotonic()
        stream: Iterator[Batch] = iter(())
        if self.step < config.steps:
            stream = self.batches.stream(self.step * config.accumulate, self.group.reader, self.group.readers)
        while self.step < config.steps and not self._stop:
            metrics = self._train_step(stream)
            last = self.step == config.steps
            if self._is_time_to_evaluate(last):
                metrics |= self._evaluation()
            self._log(metrics)
            minutes = config.checkpoint.minutes
            overdue = minutes is not None and time.monotonic() - saved_at > 60 * minutes
            over = config.stop_after_minutes is not None and time.monotonic() - started > 60 * config.stop_after_minutes
            self._stop = self._agree(self._stop or over)
            if last or self._stop or self.step % config.checkpoint.every == 0 or self._agree(overdue):
                self.save(required=last or self._stop)
                saved_at = time.monotonic()
            self._settle(wait=False)
        self._settle(wait=True)

    def _train_step(self, stream: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step; returns its metrics. Leaves weights and ``self.step`` alone if a number is not finite."""
        config, device, began = self.config, self.group.device, time.monotonic()
        # Dropout, where there is any, must fall the same way in a run that resumes here.
        torch.manual_seed(config.seed + 1_000_003 * self.step + self.group.reader)
        batches = [
            to_device(self._complete(next(stream)), device) for _ in range(config.accumulate // self.group.readers)
        ]
        targets = [shifted_targets(batch["labels"], batch["segments"]) for batch in batches]
        waited = time.monotonic() - began
        counts = [
            sum(int((t != IGNORE).sum()) for t in targets),
            sum(int((batch["segments"] > 0).sum()) for batch in batches),
            sum(int(batch["segments"].amax(1).sum()) for batch in batches),
        ]
        learnt, tokens, samples = (int(n) for n in self.group.total(*counts))
        if not learnt:
            raise TrainingError(
                f"Step {self.step + 1} holds no token to learn: every label of its {config.accumulate} micro-batches "
                f"is {IGNORE}. Are the assistant's answers there?"
            )
        self.model.train()
        entropy = torch.zeros((), dtype=torch.float64)
        for number, (batch, targets_BT) in enumerate(zip(batches, targets, strict=True)):
            self._synchronise_gradients(number == len(batches) - 1)
            entropy += self._backward(batch, targets_BT, learnt)
        loss = self.group.total(entropy)[0] / learnt
        norm = self._gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._give_up(loss, norm)
        rates = set_rate(self.optimizer, rate_at(self.step + 1, config.steps, config.optim))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.loss = loss
        if self.average is not None:
            self.average.update(self.model, self.step)
        seconds = time.monotonic() - began
        return {
            "step": self.step, "loss": loss, "tokens": tokens, "lr": max(rates.values()), "targets": learnt,
            "samples": samples, "grad_norm": norm, "seconds": round(seconds, 4), "waited": round(waited, 4),
            "tokens_per_s": round(tokens / seconds, 1), "samples_per_s": round(samples / seconds, 2),
            "memory_gib": round(_memory(device), 2), **self._utilisation(batches, seconds),
        }  # fmt: skip

    def _backward(self, batch: Batch, targets_BT: Tensor, learnt: int) -> Tensor:
        """Add one micro-batch's gradients; returns its summed cross entropy, in float64 on the CPU."""
        mask_BT = targets_BT != IGNORE
        with self._autocast():
            logits_KV = self.model(**model_inputs(batch, self.masked), logits_mask=mask_BT)
        total, entropy = token_loss(logits_KV, targets_BT[mask_BT], self.config.optim.z_loss)
        # FSDP takes the mean over processes; the loss is the mean over all tokens of all of them.
        (total * (self.group.readers / learnt)).backward()  # type: ignore[no-untyped-call]
        return entropy.double().cpu()

    def _complete(self, batch: Batch) -> Batch:
        return with_tiles(batch, self.model.config) if self.group.world > 1 else batch

    def _utilisation(self, batches: list[Batch], seconds: float) -> dict[str, float]:
        """This process's model FLOPs over what its device could have done in the time."""
        peak = peak_flops(self.group.device, self.config.precision == "bfloat16")
        if peak is None or not hasattr(self.model.config, "tokens_per_tile"):
            return {}
        return {"mfu": round(sum(batch_flops(self.model, batch) for batch in batches) / seconds / peak, 4)}

    def _gradient_norm(self) -> float:
        clip = self.config.optim.clip
        most, parameters = math.inf if clip is None else clip, trainable(self.model).values()
        if self.group.tensor > 1:
            return clip_over_meshes(parameters, most, self.group.world)
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _give_up(self, loss: float, norm: float) -> None:
        """Keep the state before a step whose numbers are not finite, then raise."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.step:
            self.save(required=True)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        first = self.step * self.config.accumulate
        raise TrainingError(
            f"Step {self.step + 1}: {what}. Its micro-batches are {first} … {first + self.config.accumulate - 1}. "
            f"The weights before it {f'are in {self.checkpoints.path(self.step)}' if self.step else 'are untouched'}. "
            f"Lower the learning rate, use precision: float32, or look at those samples; the same command then goes on."
        )

    def _is_time_to_evaluate(self, last: bool) -> bool:
        every = self.config.eval.every
        return self.evaluate is not None and (last or bool(every and self.step % every == 0))

    @torch.no_grad()
    def _evaluation(self) -> dict[str, Any]:
        assert self.evaluate is not None
        self.model.eval()
        # Compiled for training; an evaluation has other shapes at every token, and is over sooner than a compilation.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        with self._averaged(), self._autocast(), eager:
            result = dict(self.evaluate(self.model, self.step))
        shown = result.pop("generations", [])
        for one in shown:
            if self.generations is not None:
                self.generations.write({"step": self.step, **one})
        self._shown = shown
        for one in shown[:4]:
            self.bar.say(f"  step {self.step}  wanted: {one.get('wanted')!r}  said: {one.get('said')!r}")
        return result

    def _log(self, metrics: dict[str, Any]) -> None:
        self.bar.update(self.step, metrics)
        wanted = self.step % self.config.log.every == 0 or self.step == self.config.steps or "eval_loss" in metrics
        if self.metrics is not None and wanted:
            self.metrics.write(metrics)
            self._track(metrics)
        self._shown = []

    def _track(self, metrics: dict[str, Any]) -> None:
        """Log to the trackers; one that fails (no disk, no network) is given up, the run is not."""
        for tracker in list(self.trackers):
            try:
                tracker.log(self.step, metrics, self._shown)
            except Exception as error:
                self.trackers.remove(tracker)
                name = type(tracker).__name__
                logger.error("%s takes no more metrics: %s. metrics.jsonl has them all.", name, error)
                with contextlib.suppress(Exception):
                    tracker.close()

    def save(self, required: bool = False) -> None:
        """Write a checkpoint. One that the disk refuses is reported and tried again later, unless ``required``."""
        if self._saved_step == self.step:
            return
        try:
            self.snapshot.save(self.step, {"step": self.step, "loss": self.loss, "frozen": self.frozen})
            self._saved_step = self.step
            if required:
                self.snapshot.finish()
        except OSError as error:
            self._not_saved(error, required)

    def _settle(self, wait: bool) -> None:
        """Make a checkpoint count that has been written in the background, or wait for it."""
        try:
            self.snapshot.finish(wait)
        except OSError as error:
            self._not_saved(error, required=wait)

    def _not_saved(self, error: OSError, required: bool) -> None:
        self._saved_step = -1
        steps = self.checkpoints.steps()
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no older checkpoint"
        text = (
            f"The checkpoint of step {self.step} could not be written to {self.checkpoints.folder}: "
            f"{error.strerror or error}; {kept}."
        )
        if required:
            raise TrainingError(f"{text} Make room and give the same command again.") from error
        logger.error("%s Training goes on and tries again at the next one. Make room.", text)
        self.bar.say(text)

    def _check(self, step: int) -> None:
        """Raise TrainingError where the checkpoint of ``step`` belongs to another model."""
        here = {name: tuple(p.shape) for name, p in trainable(self.model).items()}
        there = self.snapshot.shapes(step)
        if here != there or self.checkpoints.facts(step)["frozen"] != self.frozen:
            differ = sorted(dict(here.items() ^ there.items()))[:5]
            raise TrainingError(
                f"{self.checkpoints.path(step)} belongs to another model or other frozen parts"
                f"{': ' + ', '.join(differ) if differ else ' (frozen weights differ)'}. Choose another run folder."
            )

    def _write_final(self, final: Path) -> None:
        assert self.save_final is not None
        beside = final.with_name(".writing-final")
        self.model.eval()
        with self._averaged():
            whole = self.model if self.blank is None else whole_model(self.model, self.blank, self.group)
            try:
                if whole is not None:
                    shutil.rmtree(beside, ignore_errors=True)
                    beside.mkdir()
                    self.save_final(whole, beside)
                    os.rename(beside, final)
            except (OSError, CheckpointError) as error:
                raise TrainingError(
                    f"{final} could not be written: {error}. The checkpoint of step {self.step} is complete; make room "
                    f"and give the same command again."
                ) from error
        self.group.wait()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, where there are any."""
        if self.average is not None:
            self.average.swap(self.model)
        try:
            yield
        finally:
            reshard(self.model)
            if self.average is not None:
                self.average.swap(self.model)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        on = self.config.precision == "bfloat16"
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=on)

    def _synchronise_gradients(self, last: bool) -> None:
        if self.group.world > 1 and hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(last)

    def _agree(self, mine: bool) -> bool:
        """Whether any process says so; all processes get the same answer."""
        return mine if self.group.world == 1 else self.group.total(float(mine))[0] > 0

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end the run after the current step, with a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: object) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.warning("Stopping after this step; the same command goes on from there.")

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def pick_device(name: str) -> torch.device:
    """``auto``: a CUDA device if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device {name!r} is not known to torch: {error}") from None


def _compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of tower and text. They share their code, so one serves them all, and what lies around them
    (counting placeholders, packing) needs no graph. Sharding's hooks stay outside.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.forward = torch.compile(block.forward, dynamic=True)


def _set_activation_checkpointing(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            setattr(module, "gradient_checkpointing", on)  # noqa: B010 - nn.Module declares no such attribute


def _memory(device: torch.device) -> float:
    """GiB in use: on the accelerator where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


@contextlib.contextmanager
def _only_one(run: Path, group: Group) -> Iterator[None]:
    """Hold the run folder's lock; raises TrainingError when another process trains in it."""
    if not group.is_first:
        yield
        return
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"Another process is training in {run}. Wait for it, or choose another run.") from None
        yield
