"""``smolvlm verify``: does this checkpoint give transformers' results here? Pixels, ids, features, logits, text.

Both libraries get the same pictures and questions. Each check compares one stage, and from the features on both models
get the very same tensors, so that a difference is reported where it arises.

What a check allows is fixed before our result is computed. Ids and greedy text: nothing. Pixels: one level of
rounding. Features and logits in fp32: 1e-4, however far the reference itself moves when its attention is computed by
its other implementation on the very same input (``reference_noise``, told beside). In bf16: twice the reference's own
distance from its fp32 result, since two roundings may err in opposite directions.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.bundle import folder_of
from smolvlm_fms.errors import ConfigurationError, MissingDependencyError
from smolvlm_fms.fms_bridge.loading import resolve_folder
from smolvlm_fms.hf.certificate_cases import Case, cases, prepare

__all__ = ["Check", "verify"]

TOLERANCE = 1e-4
"""fp32: what different orders of summation add up to over some thirty layers; argmax must agree besides."""

PIXEL_TOLERANCE = 1.01 * 2 / 255
"""One level of rounding of an 8-bit pixel, after normalisation with a standard deviation of 0.5."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute difference, the share of elements (or tokens) that agree, the verdict.

    bound: the largest difference that passes; reference_noise: how far the reference moves under another arithmetic
    of its own, where that was measured.
    """

    name: str
    max_abs: float
    agree: float
    ok: bool
    bound: float = 0.0
    reference_noise: float | None = None


def verify(
    model: str | Path,
    new_tokens: int = 24,
    dtype: str = "float32",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare a checkpoint (folder or hub id) with transformers on the CPU.

    dtype: ``"float32"`` or ``"bfloat16"``; new_tokens: greedy tokens a case; progress: told what is being done.

    Returns ``{"ok", "model", "dtype", "checks": [{"name", "max_abs", "agree", "ok", "bound", "reference_noise"}],
    "skipped": [{"name", "reason"}], "seconds", "threads", "versions"}``; see :class:`Check`. Raises
    MissingDependencyError, ConfigurationError and what loading raises.
    """
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise MissingDependencyError(
            f"verify compares in fp32 and needs transformers 5; {transformers.__version__} is here. It gives "
            "full tiles wrong position ids in fp32, so a difference from it would say nothing."
        )
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; verify compares in {' or '.join(DTYPES)}.")
    from smolvlm_fms.hf.certificate_sides import Ours, Reference

    begin = time.perf_counter()
    say = progress or (lambda _: None)
    folder = resolve_folder(folder_of(model))
    say("loading the checkpoint with transformers")
    reference = Reference(folder, DTYPES[dtype])
    say("loading the checkpoint")
    ours = Ours(folder, DTYPES[dtype], reference)
    mine, theirs = _processors(folder)
    checks: list[Check] = []
    skipped: list[dict[str, str]] = []
    with torch.inference_mode():
        for case in cases(videos=getattr(mine, "video_processor", None) is not None):
            say(f"{case.name}: processors")
            inputs, found, missing = _compare_processors(case, mine, theirs)
            checks += found
            skipped += missing
            say(f"{case.name}: {inputs['input_ids'].shape[1]} tokens, transformers")
            expected, noise = reference.read(inputs, new_tokens)
            say(f"{case.name}: {inputs['input_ids'].shape[1]} tokens, this package")
            checks += _compare_models(case.name, ours.read(inputs, new_tokens), expected, noise, dtype)
    return {
        "ok": all(check.ok for check in checks),
        "model": str(model),
        "dtype": dtype,
        "checks": [asdict(check) for check in checks],
        "skipped": skipped,
        "seconds": round(time.perf_counter() - begin, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a parity certificate depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("smolvlm-fms", "torch", "transformers", "ibm-fms", "tokenizers", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processors(folder: Path) -> tuple[Any, Any]:
    """Our processor and transformers' for ``folder``, both with the PIL back end's pixels, which are our default.

    Where torchvision is installed, transformers would take its tensor back end, which rounds in other places.
    """
    from transformers import AutoImageProcessor

    from smolvlm_fms.hf.reference import reference_processor
    from smolvlm_fms.processing import load_processor

    reference = reference_processor(folder)
    if not type(reference.image_processor).__name__.endswith("Pil"):
        reference.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return load_processor(folder), reference


def _compare_processors(
    case: Case, mine: Any, theirs: Any
) -> tuple[dict[str, Tensor], list[Check], list[dict[str, str]]]:
    """The models' inputs (transformers', where it can make them), the checks, and what could not be checked."""
    batch = prepare(mine, case)
    if case.frames is not None and getattr(theirs, "video_processor", None) is None:
        reason = "transformers' video processor needs torchvision, which is not installed"
        return batch, [], [{"name": f"{case.name}: {stage}", "reason": reason} for stage in ("ids", "pixels")]
    inputs = {name: torch.as_tensor(value) for name, value in prepare(theirs, case).items()}
    checks = [_equal(f"{case.name}: ids", batch["input_ids"], inputs["input_ids"])]
    if "pixel_values" in inputs:
        pixels, expected = batch["pixel_values"], inputs["pixel_values"]
        checks.append(_close(f"{case.name}: pixels", pixels, expected, PIXEL_TOLERANCE))
    return inputs, checks, []


def _compare_models(name: str, mine: Any, reference: Any, noise: Any, dtype: str) -> list[Check]:
    """Features, logits and text of two readings of the same inputs."""
    checks = []
    if reference.features is not None:
        bound = _bound(noise.features, dtype)
        checks.append(_close(f"{name}: features", mine.features, reference.features, bound, noise.features))
    bound = _bound(noise.logits, dtype)
    exact = dtype == "float32"
    logits = _close(f"{name}: logits", mine.logits, reference.logits, bound, noise.logits, argmax=True, every=exact)
    text = _equal(f"{name}: greedy text", mine.tokens, reference.tokens)
    return [*checks, logits, text if exact else _undecided(text, mine.tokens, reference, bound)]


def _bound(noise: float | None, dtype: str) -> float:
    if noise is None or dtype == "float32":
        return TOLERANCE
    return max(TOLERANCE, 2 * noise)


def _undecided(check: Check, mine: Tensor, reference: Any, bound: float) -> Check:
    """In bf16, texts may part where the reference's own choice was closer than both logits' bounds together."""
    length = min(len(mine), len(reference.tokens))
    parts = (mine[:length] != reference.tokens[:length]).nonzero()
    if check.ok or not len(parts):
        return check
    first = int(parts[0])
    largest = float((mine[:length] - reference.tokens[:length]).abs().max())
    ok = reference.leads[first] <= 2 * bound
    return Check(check.name, largest, first / max(len(mine), len(reference.tokens)), ok)


def _equal(name: str, mine: Tensor, reference: Tensor) -> Check:
    """All elements equal, whatever the shapes: a different number of tokens is a difference."""
    mine, reference = torch.as_tensor(mine), torch.as_tensor(reference)
    if mine.shape != reference.shape:
        return Check(name, float("inf"), 0.0, False)
    agree = float((mine == reference).float().mean()) if mine.numel() else 1.0
    difference = float((mine - reference).abs().max()) if mine.numel() else 0.0
    return Check(name, difference, agree, agree == 1.0)


def _close(
    name: str,
    mine: Tensor,
    reference: Tensor,
    bound: float,
    noise: float | None = None,
    *,
    argmax: bool = False,
    every: bool = True,
) -> Check:
    """No element further than ``bound``. ``argmax``: the share that agrees is of largest elements; with ``every``, all
    of them must.
    """
    mine, reference = torch.as_tensor(mine).float(), torch.as_tensor(reference).float()
    if mine.shape != reference.shape:
        return Check(name, float("inf"), 0.0, False, bound, noise)
    difference = (mine - reference).abs()
    near = mine.argmax(-1) == reference.argmax(-1) if argmax else difference <= bound
    largest = float(difference.max()) if bool(difference.isfinite().all()) else float("inf")
    agree = float(near.float().mean())
    return Check(name, largest, agree, largest <= bound and (agree == 1.0 or not every), bound, noise)
