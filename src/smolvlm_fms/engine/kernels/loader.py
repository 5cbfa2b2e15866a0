"""Finds and opens the compiled kernels; the one place that knows the C structures of ``csrc/svk.h``."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch  # first, so that the kernels join the OpenMP runtime that torch brings

from smolvlm_fms.errors import CapacityError, ConfigurationError, MissingDependencyError

LIBRARY = Path(__file__).with_name("libsvk.so")

BF16, INT8_CHANNEL, INT8_GROUPS, INT4_GROUPS, BF16_COMPACT = range(5)
NO_ACTIVATION, GELU_TANH, SWIGLU, QUICK_GELU = range(4)
OK, NO_MEMORY, BAD_ARGUMENT = 0, -1, -2

_i64, _f32, _ptr = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Weights(ctypes.Structure):
    """``svk_weights``"""

    _fields_ = [("kind", _i64), ("n", _i64), ("k", _i64), ("packed", _ptr), ("scales", _ptr), ("bias", _ptr)]


class LinearArgs(ctypes.Structure):
    """``svk_linear_args``"""

    _fields_ = [
        ("x", _ptr),
        ("rows", _i64),
        ("x_stride", _i64),
        ("activation", _i64),
        ("scale", _f32),
        ("residual", _ptr),
        ("out", _ptr),
        ("out_f32", _ptr),
        ("out_stride", _i64),
        ("threads", _i64),
    ]


class VisionAttentionArgs(ctypes.Structure):
    """``svk_vision_attention_args``"""

    _fields_ = [
        ("qkv", _ptr),
        ("key_mask", _ptr),
        ("out", _ptr),
        ("batch", _i64),
        ("tokens", _i64),
        ("heads", _i64),
        ("d", _i64),
        ("scale", _f32),
        ("threads", _i64),
    ]


class NormArgs(ctypes.Structure):
    """``svk_norm_args``"""

    _fields_ = [
        ("x", _ptr),
        ("weight", _ptr),
        ("bias", _ptr),
        ("out", _ptr),
        ("rows", _i64),
        ("width", _i64),
        ("x_stride", _i64),
        ("subtract_mean", _i64),
        ("eps", _f32),
        ("threads", _i64),
    ]


class Cache(ctypes.Structure):
    """``svk_cache``"""

    _fields_ = [
        ("keys", _ptr),
        ("values", _ptr),
        ("key_layer", _i64),
        ("key_head", _i64),
        ("value_layer", _i64),
        ("value_head", _i64),
        ("tokens", _i64),
    ]


class Rope(ctypes.Structure):
    """``svk_rope``"""

    _fields_ = [("cos", _ptr), ("sin", _ptr), ("interleaved", _i64)]


class CausalAttentionArgs(ctypes.Structure):
    """``svk_causal_attention_args``"""

    _fields_ = [
        ("qkv", _ptr),
        ("out", _ptr),
        ("rows", _i64),
        ("out_stride", _i64),
        ("heads", _i64),
        ("kv_heads", _i64),
        ("d", _i64),
        ("layer", _i64),
        ("start", _i64),
        ("position", _i64),
        ("scale", _f32),
        ("threads", _i64),
    ]


class Layer(ctypes.Structure):
    """``svk_layer``"""

    _fields_ = [
        ("qkv", Weights),
        ("out", Weights),
        ("gate_up", Weights),
        ("down", Weights),
        ("attention_norm", _ptr),
        ("mlp_norm", _ptr),
    ]


class TextModel(ctypes.Structure):
    """``svk_text_model``"""

    _fields_ = [
        ("layers", _i64),
        ("width", _i64),
        ("heads", _i64),
        ("kv_heads", _i64),
        ("d", _i64),
        ("ff", _i64),
        ("layer", ctypes.POINTER(Layer)),
        ("final_norm", _ptr),
        ("embeddings", _ptr),
        ("head", Weights),
        ("rope", Rope),
        ("eps", _f32),
        ("attention_scale", _f32),
        ("embedding_scale", _f32),
        ("residual_scale", _f32),
        ("logits_scale", _f32),
    ]


class StepArgs(ctypes.Structure):
    """``svk_step_args``"""

    _fields_ = [
        ("hidden", _ptr),
        ("positions", _ptr),
        ("starts", _ptr),
        ("logits", _ptr),
        ("normed", _ptr),
        ("rows", _i64),
        ("threads", _i64),
        ("ids", _ptr),
        ("banned", _ptr),
        ("banned_count", _i64),
        ("best", _ptr),
    ]


class TowerLayer(ctypes.Structure):
    """``svk_tower_layer``"""

    _fields_ = [
        ("qkv", Weights),
        ("out", Weights),
        ("up", Weights),
        ("down", Weights),
        ("attention_norm", _ptr),
        ("attention_norm_bias", _ptr),
        ("mlp_norm", _ptr),
        ("mlp_norm_bias", _ptr),
    ]


class Tower(ctypes.Structure):
    """``svk_tower``"""

    _fields_ = [
        ("layers", _i64),
        ("width", _i64),
        ("heads", _i64),
        ("d", _i64),
        ("ff", _i64),
        ("activation", _i64),
        ("layer", ctypes.POINTER(TowerLayer)),
        ("eps", _f32),
        ("attention_scale", _f32),
    ]


class TowerArgs(ctypes.Structure):
    """``svk_tower_args``"""

    _fields_ = [
        ("hidden", _ptr),
        ("out", _ptr),
        ("key_mask", _ptr),
        ("tokens", _i64),
        ("first", _i64),
        ("last", _i64),
        ("threads", _i64),
    ]


_FUNCTIONS: dict[str, list[type]] = {
    "svk_linear": [Weights, LinearArgs],
    "svk_vision_attention": [VisionAttentionArgs],
    "svk_norm": [NormArgs],
    "svk_causal_attention": [Cache, Rope, CausalAttentionArgs],
    "svk_decode": [TextModel, Cache, StepArgs],
    "svk_tower_blocks": [Tower, TowerArgs],
    "svk_prefill": [TextModel, Cache, StepArgs],
}


@cache
def _open() -> ctypes.CDLL | None:
    path = Path(os.environ.get("SMOLVLM_KERNELS", LIBRARY))
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # built for another system, or its OpenMP runtime is missing
        return None
    library.svk_isa.restype = ctypes.c_char_p
    library.svk_pack_bf16.argtypes = [_ptr, _i64, _i64, _ptr, _i64]
    library.svk_pack_bf16_compact.argtypes = [_ptr, _i64, _i64, _ptr, _ptr, _i64]
    library.svk_pack_bf16_compact.restype = _i64
    library.svk_rows.argtypes = [ctypes.POINTER(Weights), _ptr, _i64, _ptr]
    for name, structures in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(structure) for structure in structures]
        function.restype = ctypes.c_int
    return library


@cache
def _best_isa() -> str:
    return isa()


def built() -> bool:
    """Whether the compiled kernels are there. ``SMOLVLM_KERNELS`` names another library, or a missing one: none."""
    return _open() is not None


def available() -> bool:
    """Whether there are compiled kernels that are worth using: on a machine where only the portable ones run, torch's
    own operators are quicker."""
    return built() and _best_isa() != "portable"


def library() -> ctypes.CDLL:
    """The library. Raises: MissingDependencyError where it was not built."""
    found = _open()
    if found is None:
        raise MissingDependencyError(
            f"the CPU kernels were not built: {LIBRARY.name} is missing beside loader.py, or cannot be opened here. "
            "Reinstall smolvlm-fms where a C++17 compiler with OpenMP is, or use the torch path"
        )
    return found


def isa() -> str:
    """The instruction set in use: ``"avx512"`` (with BF16 and VNNI), ``"avx2"``, ``"neon"`` (with BF16 and I8MM),
    ``"portable"``, or ``"none"``."""
    found = _open()
    return "none" if found is None else str(found.svk_isa().decode())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the block on another instruction set (for tests and measurements; the whole process is switched).

    Raises: ConfigurationError where this machine cannot run it.
    """
    before, _ = isa(), _best_isa()
    if library().svk_set_isa(name.encode()) != OK:
        raise ConfigurationError(f"this machine cannot run the {name!r} kernels; it runs {before!r}")
    try:
        yield
    finally:
        library().svk_set_isa(before.encode())


def check(status: int, what: str) -> None:
    """Raises: CapacityError or ConfigurationError for a kernel's answer other than OK."""
    if status == NO_MEMORY:
        raise CapacityError(f"{what}: no memory for the kernel's scratch; use shorter inputs or fewer threads")
    if status != OK:
        raise ConfigurationError(f"{what}: the kernel does not know these sizes or kinds (status {status})")


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's first element, or None."""
    return None if tensor is None else tensor.data_ptr()
