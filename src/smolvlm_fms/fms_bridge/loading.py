"""From a checkpoint folder (or hub id) to a model, with a two-way audit of names and shapes before any tensor is read.

config.json ─▶ architecture ─▶ model on the meta device ─▶ what the checkpoint must hold ─┐
*.safetensors headers ─▶ what it does hold ────────────────────────────────────────────▶ audit
                                                  layer by layer: read ▸ adapt ▸ assign ◀─┘
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fms.modules import UninitializedModule
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolvlm_fms.config import read_json_config
from smolvlm_fms.errors import CheckpointError, ConfigurationError, FetchError, UnsafeCheckpointError
from smolvlm_fms.fms_bridge.adapters import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    Family,
    canonical_name,
    from_source,
    group_of,
    head_names,
    split,
    to_hf,
)
from smolvlm_fms.fms_bridge.reading import PICKLES
from smolvlm_fms.fms_bridge.register import Architecture, architecture_of

__all__ = ["Checkpoint", "Entry", "audited", "format_of", "load_model", "open_checkpoint", "resolve_folder"]

log = logging.getLogger(__name__)

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""What is fetched of a hub repository: no pickles, no other frameworks' weights."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: the file and the name it has there, its shape and dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a folder's safetensors files, under current names; ``source`` is their format (hf or fms)."""

    folder: Path
    source: str
    entries: Mapping[str, Entry]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Map the tensors ``names``. They share the file's pages until they are written to."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.entries[name].file].append(name)
        result: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            # A handle a call: its mapping ends with the last tensor that lies in it.
            with _open(file) as handle:
                result |= {name: handle.get_tensor(self.entries[name].name) for name in wanted}
        return result


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    vision_only: bool = False,
    revision: str | None = None,
    progress: Callable[[float], None] | None = None,
    **changes: Any,
) -> Any:
    """Load a model from a checkpoint folder or a hub id; returns it in evaluation mode, weights in place.

    dtype: of the floating-point weights; None keeps the checkpoint's. progress: called with the fraction done, 0…1.
    changes: fields of the configuration to override (``fused_weights=False``, ``tie_word_embeddings=…``).

    On the CPU, tensors that need neither conversion nor reordering stay memory-mapped; nothing is held twice.
    Raises CheckpointError naming the tensors when they are not exactly those that the configuration calls for,
    UnsafeCheckpointError for pickles, ConfigurationError for a bad config.json, FetchError for hub ids.
    """
    folder = resolve_folder(folder, revision=revision)
    values = read_json_config(folder)
    if (values.get("quantization_config") or {}).get("quant_method") == "smolvlm_fms":
        raise CheckpointError(
            f"{folder} holds quantised weights in this package's own layout: smolvlm_fms.load reads them. For "
            "training, transformers or FMS, take the checkpoint that they were made from."
        )
    architecture = architecture_of(values.get("model_type"))
    family = FAMILIES[architecture.name]
    checkpoint = open_checkpoint(folder, family)
    config: Any = architecture.config.from_hf(values).updated(**changes)  # type: ignore[attr-defined]
    if not vision_only and "tie_word_embeddings" not in changes:
        config = config.updated(tie_word_embeddings=decide_tied(config, values, checkpoint, family))
    model = _build(architecture, config, vision_only, dtype or _stored_dtype(checkpoint, config))
    if dtype is None and config.linear_config is None:
        dtype = _stored_dtype(checkpoint, config)  # quantised checkpoints keep the dtypes that each tensor has
    checkpoint = audited(model, family, config, checkpoint, vision_only)
    state: dict[str, Tensor] = {}
    groups = _groups(checkpoint)
    with torch.no_grad():
        for done, names in enumerate(groups, 1):
            tensors = {
                n: t for part in _reads(checkpoint, family, names, config) for n, t in checkpoint.read(part).items()
            }
            for name, tensor in from_source(family, checkpoint.source, tensors, config).items():
                state[name] = _placed(name, tensor, dtype, device)
            if progress is not None:
                progress(done / len(groups))
    if config.tie_word_embeddings and not vision_only:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    model.post_init()
    return model.eval()


def resolve_folder(name: str | Path, *, revision: str | None = None, **hub: Any) -> Path:
    """Return a local checkpoint folder as it is; fetch a hub id (``owner/name``) into the hub's cache.

    hub: further options of ``huggingface_hub.snapshot_download`` (``cache_dir``, ``token``, ``local_files_only`` …).

    ``HF_HUB_OFFLINE=1`` makes the hub library look in its cache only. Raises FetchError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder with config.json and *.safetensors.")
    if isinstance(name, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "~")):
        raise FetchError(f"There is no folder {str(name)!r}, and it is not a hub id of the form owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise FetchError(
            f"There is no folder {name!r} here, and the hub's model of that name could not be fetched: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def open_checkpoint(folder: Path, family: Family) -> Checkpoint:
    """Read the headers of the folder's safetensors files; raises CheckpointError or UnsafeCheckpointError."""
    raws = [raw for file in _weight_files(folder) for raw in _headers(file)]
    if not raws:
        raise CheckpointError(f"The safetensors files in {folder} hold no tensors.")
    source = format_of(raw.name for raw in raws)
    entries: dict[str, Entry] = {}
    for raw in raws:
        name = raw.name if source == "fms" else canonical_name(family, raw.name)
        if name is None:
            continue
        if name in entries:
            raise CheckpointError(
                f"{folder} holds {name} twice: in {entries[name].file.name} and in {raw.file.name}. Remove the files "
                "that do not belong to this checkpoint."
            )
        entries[name] = raw
    return Checkpoint(folder, source, entries)


def format_of(names: Iterable[str]) -> str:
    """``"fms"`` for tensors under this package's names, else ``"hf"``.

    LLaVA-Next's towers share some names with ours in transformers' newest layout, so names that are only ours decide.
    """
    return "fms" if any(name.startswith(("vision_tower.layers.", "text_model.base_model.")) for name in names) else "hf"


def decide_tied(config: Any, values: Mapping[str, Any], checkpoint: Checkpoint, family: Family) -> bool:
    """Whether head and embedding are one tensor: the only place where that is decided.

    The configuration's word (the top level's, as in transformers) holds unless the tensors contradict it: two
    different tensors are never tied, and a checkpoint without a head is tied where its text_config says so.
    """
    head, embedding = head_names(family, checkpoint.source)
    if head not in checkpoint.entries:
        text = values.get("text_config") or {}
        return bool(config.tie_word_embeddings or text.get("tie_word_embeddings"))
    if not config.tie_word_embeddings or embedding not in checkpoint.entries:
        return bool(config.tie_word_embeddings)
    both = checkpoint.read([head, embedding])
    if torch.equal(both[head], both[embedding]):
        return True
    log.warning(
        "config.json ties lm_head to the embeddings, but the checkpoint holds two different tensors; both are used."
    )
    return False


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, else all."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
        # An index comes with the checkpoint; it must not lead out of its folder.
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of the files its index names: {_some(missing)}.")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    whole = folder / "model.safetensors"
    if files:
        return [whole] if whole in files else files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UnsafeCheckpointError(
            f"{folder} holds its weights as pickles ({_some(pickles)}), which can run code when opened. Convert them "
            "to safetensors first, or take a revision of the model that has them."
        )
    raise CheckpointError(f"There are no *.safetensors files in {folder}.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors (cut short, or damaged?): {error}") from error


def _headers(file: Path) -> Iterator[Entry]:
    with _open(file) as handle:
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            part = handle.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{file}: {name} has dtype {part.get_dtype()}, which is not supported.")
            yield Entry(file, name, tuple(part.get_shape()), dtype)


def _stored_dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """The dtype that all floating-point tensors share; where they differ, the one that config.json names."""
    found = {entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point}
    if len(found) == 1:
        return found.pop()
    named = getattr(torch, str(config.dtype), None) if config.dtype else None
    if isinstance(named, torch.dtype):
        return named
    return torch.float32


def _build(architecture: Architecture, config: Any, vision_only: bool, dtype: torch.dtype) -> Any:
    """The model without memory behind its weights."""
    if not dtype.is_floating_point:
        raise ConfigurationError(f"dtype {dtype} is not a floating-point type.")
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = architecture.model_class()(config, vision_only=vision_only)
            _initialise_linears(model)
            return model
    finally:
        torch.set_default_dtype(previous)


def _initialise_linears(model: Any) -> None:
    """Give linears whose kind depends on their name (a callable ``linear_type``) that kind, as get_model does."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UninitializedModule):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.initialize(name))
            model.get_submodule(name).module_name = name


def audited(model: Any, family: Family, config: Any, checkpoint: Checkpoint, vision_only: bool) -> Checkpoint:
    """The checkpoint, restricted to what the model uses; CheckpointError unless names and shapes fit both ways."""
    held = dict(checkpoint.entries)
    if config.tie_word_embeddings:
        # One of the two is enough, and the adapter takes either (see tied_head_step).
        head, embedding = head_names(family, checkpoint.source)
        twin = held.pop(head, None)
        if twin is not None:
            held.setdefault(embedding, twin)
    if vision_only:
        held = {name: entry for name, entry in held.items() if not _beyond_embeddings(family, name)}
    # Fused linears are compared in their parts, so that either form can be loaded into either.
    wanted = dict(model.state_dict())
    if config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    wanted = split(wanted, config) if checkpoint.source == "fms" else to_hf(family, wanted, config)
    found = split({name: torch.empty(e.shape, device="meta") for name, e in held.items()}, config)
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    complaints = [
        f"{len(names)} {what}: {_some(names)}."
        for what, names in (
            ("missing", sorted(wanted.keys() - found.keys())),
            ("unexpected", sorted(found.keys() - wanted.keys())),
            ("of another shape", misshapen),
        )
        if names
    ]
    if complaints:
        raise CheckpointError(f"The tensors in {checkpoint.folder} do not fit its config.json. " + " ".join(complaints))
    return Checkpoint(checkpoint.folder, checkpoint.source, held)


def _beyond_embeddings(family: Family, name: str) -> bool:
    """Whether a tensor belongs to the part that ``vision_only`` leaves out."""
    ours = family.ours(name) or name
    return ours.startswith("text_model.") and ours != EMBEDDING


def _groups(checkpoint: Checkpoint) -> list[list[str]]:
    """Names that are read together: a layer each, since the steps join tensors within one."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.entries:
        groups[group_of(name)].append(name)
    return list(groups.values())


def _reads(checkpoint: Checkpoint, family: Family, names: list[str], config: Any) -> tuple[list[str], list[str]]:
    """``names`` in two parts: tensors that become parameters as they are, and those that are joined or reordered.

    Tensors read together share one mapping of the file, which lasts as long as any of them. Read apart, the pages of
    what was only copied from leave memory with it.
    """
    empty = {name: torch.empty(checkpoint.entries[name].shape, device="meta") for name in names}
    kept = {id(tensor) for tensor in from_source(family, checkpoint.source, empty, config).values()}
    return [n for n in names if id(empty[n]) in kept], [n for n in names if id(empty[n]) not in kept]


def _placed(name: str, tensor: Tensor, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.to(device)
    placed = tensor.to(device, dtype)
    if dtype == torch.float16 and not bool(placed.isfinite().all()):
        raise CheckpointError(
            f"{name} has values up to {float(tensor.abs().max()):.4g}, more than float16 can hold (65504). Load the "
            "model in bfloat16 or float32."
        )
    return placed


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
