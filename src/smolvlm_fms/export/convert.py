"""The one way through a conversion, whatever the target: find, load, write beside, check, move into place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.export.checks import Check, compare, make_cases, own_forward
from smolvlm_fms.export.output import check_space, output_folder
from smolvlm_fms.export.source import Source, find_source
from smolvlm_fms.export.targets import TARGETS, make_target
from smolvlm_fms.fms_bridge.loading import load_model

__all__ = ["TARGETS", "Conversion", "convert"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What was written, and how it compares with its source. ``ok`` is whether every check held; only then is there
    anything at ``out``. files: sizes in bytes, by name."""

    ok: bool
    model: str
    target: str
    out: str
    quantize: str | None
    dtype: str
    files: dict[str, int]
    checks: list[Check]
    seconds: float


def convert(
    model: str | Path,
    out: str | Path,
    to: str,
    *,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    check_tower: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Convert ``model`` (a folder, a hub id, ``"demo"``, a training run, an adapter) into the folder ``out``.

    to: one of TARGETS. quantize: ``"int8"`` or ``"int4"``, with ``hf`` and ``gguf``. adapter: a LoRA adapter to merge.
    dtype: of the weights written (None: the checkpoint's own). force: replace an earlier conversion at ``out``.
    check_tower: with ``hf``, also measure what an int8 vision tower would cost (for information; loads it three times).
    say: gets a line as each part of the work begins.

    The result is checked before it is moved to ``out``. Where a check fails, nothing is left there and the returned
    ``ok`` is false. Raises ConfigurationError, CheckpointError, FetchError, CapacityError or MissingDependencyError.
    """
    started = time.perf_counter()
    target = make_target(to, quantize)
    if check_tower and to != "hf":
        raise ConfigurationError(f"The int8 tower is this package's own; check it with 'hf', not {to!r}.")
    chosen = _dtype(dtype) or target.dtype
    source = find_source(model, adapter)
    out = Path(out).expanduser()
    with output_folder(out, source.folder, force) as output:
        what = f"{source.folder}" + (f" and the adapter {source.adapter}" if source.adapter else "")
        loaded = source.load(chosen, lambda done: say(f"reading {what}: {done:.0%}"))
        kept = next(loaded.parameters()).dtype
        check_space(out, target.expected_bytes(loaded))
        say(f"writing {to}")
        target.write(loaded, source.folder, output.path)
        files = {
            str(p.relative_to(output.path)): p.stat().st_size for p in sorted(output.path.rglob("*")) if p.is_file()
        }
        say("checking")
        checks = target.check(loaded, source.folder, output.path)
        if chosen is not None:
            checks += _rounding(source, loaded, kept)
        if check_tower:
            say("measuring the int8 tower")
            checks += _int8_tower(output.path)
        output.keep = all(check.ok for check in checks)
    return Conversion(
        ok=output.keep,
        model=str(model),
        target=to,
        out=str(out),
        quantize=quantize,
        dtype=str(kept).removeprefix("torch."),
        files=files,
        checks=checks,
        seconds=time.perf_counter() - started,
    )


def _rounding(source: Source, written: Any, dtype: torch.dtype) -> list[Check]:
    """What the conversion to another dtype costs, for information. ``written`` has been widened to fp32 by now."""
    stored = next(load_model(source.folder, vision_only=True).parameters()).dtype
    if torch.promote_types(stored, dtype) == dtype:  # a wider type holds every value
        return []
    exact = source.load(next(written.parameters()).dtype)
    cases = make_cases(source.folder, exact.config)
    name = str(dtype).removeprefix("torch.")
    return compare(exact, own_forward(written), cases, what=f"rounding to {name}, ", bound=None)


def _int8_tower(folder: Path) -> list[Check]:
    """Feature error and answers of ``quantize_tower="int8"``, which is chosen at load: for information."""
    from smolvlm_fms.engine.quantize_tower import check_int8_tower

    found = check_int8_tower(folder)
    shown = f"{found.pictures} pictures, for information"
    error = f"RMS error {found.int8_error:.2%} of the features (at most {found.worst_int8_error:.2%}; bfloat16 "
    return [
        Check("int8 tower: features", None, 1 - found.int8_error, True, f"{error}{found.bf16_error:.2%}), {shown}"),
        Check("int8 tower: answers", None, found.answers_agree, True, f"{found.tokens_agree:.2%} of tokens, {shown}"),
    ]


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConfigurationError(f"dtype is {name!r}; {', '.join(DTYPES)} are possible.")
    return None if name is None else DTYPES[name]
