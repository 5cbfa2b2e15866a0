"""Where a conversion goes: written beside its place, checked there, and moved when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from smolvlm_fms.errors import CapacityError, CheckpointError

__all__ = ["PROCESSOR_FILES", "Output", "check_space", "copy_processor_files", "output_folder"]

PROCESSOR_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
"""What goes with the weights as it is: tokenizer, templates, picture processing, defaults of generation."""

_MARKS = ("config.json", "*.gguf", "onnx/*.onnx")
"""One of these is in every folder that a conversion writes: others are never replaced."""


def copy_processor_files(source: Path, target: Path) -> None:
    """Copy PROCESSOR_FILES and named chat templates, where there are any."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "chat_templates").is_dir():
        shutil.copytree(source / "chat_templates", target / "chat_templates")


def check_space(place: Path, needed: int) -> None:
    """Raise CapacityError unless ``place``'s file system has room for ``needed`` bytes and a tenth more."""
    existing = next(p for p in (place, *place.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed * 1.1:
        raise CapacityError(
            f"The converted model needs about {needed / 1e6:,.0f} MB, and {existing} has {free / 1e6:,.0f} MB free. "
            "Free some space, or convert to another disk."
        )


@dataclass
class Output:
    """A folder that is being written; ``keep`` says whether it is worth to be moved into its place."""

    path: Path
    keep: bool = False


@contextlib.contextmanager
def output_folder(out: Path, source: Path, force: bool) -> Iterator[Output]:
    """A scratch folder beside ``out``, which becomes ``out`` if the block sets ``keep``, and else vanishes.

    An ``out`` that exists and is not empty is replaced with ``force`` only, and only where it holds a conversion or a
    checkpoint. Raises CheckpointError.
    """
    out = out.absolute()
    if out.exists():
        _refuse(out, source, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    output = Output(scratch)
    try:
        yield output
        if not output.keep:
            return
        scratch.chmod(0o777 & ~_umask())  # mkdtemp's folders are their owner's alone
        if out.exists():
            old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-old-"))
            os.replace(out, old)
            os.replace(scratch, out)
            shutil.rmtree(old)
        else:
            os.replace(scratch, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refuse(out: Path, source: Path, force: bool) -> None:
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; a conversion writes a folder.")
    if out.samefile(source) or source.absolute().is_relative_to(out):
        raise CheckpointError(f"{out} holds the model that is converted; choose another folder.")
    if not any(out.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{out} exists and is not empty; choose another folder, or replace it with --force.")
    if not any(any(out.glob(mark)) for mark in _MARKS):
        raise CheckpointError(f"{out} holds no model, so --force does not replace it; choose another folder.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
