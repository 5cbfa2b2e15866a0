"""How large an engine is: slots, bytes and steps. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from smolvlm_fms.errors import ConfigurationError

__all__ = ["BLOCK", "EngineConfig"]

BLOCK = 64
"""Tokens in the smallest piece of the KV cache; also the width of the kernels' key blocks."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. None of them changes what is generated.

    max_sequences: sequences computed at once; more wait their turn.
    kv_bytes: memory for keys and values (None: enough for one full context, at least 512 MB, at most a quarter of the
        memory that this process may use; on a GPU half of what is free). Pages are touched only as they fill.
    prefix_bytes: how much of it may keep the keys and values of finished sequences, for prompts that begin the same.
        None: all that running sequences leave.
    image_cache_bytes: memory for the features of pictures seen before.
    prefill_chunk: prompt tokens computed in one step while other sequences are generating.
    prefill_chunk_alone: the same while nobody is kept waiting. By default a picture of 17 tiles and its question fit.
    tiles_per_step: tiles that go through the tower in one step.
    context_length: at most so many tokens a sequence (None: what the checkpoint allows).
    compile_decode: compile the decode step with torch's compiler before it becomes a CUDA graph (GPUs only): some ten
        seconds for every new size of batch and context, and quicker steps from then on.
    """

    max_sequences: int = 32
    kv_bytes: int | None = None
    prefix_bytes: int | None = None
    image_cache_bytes: int = 256 * 2**20
    prefill_chunk: int = 256
    prefill_chunk_alone: int = 1280
    tiles_per_step: int = 1
    context_length: int | None = None
    compile_decode: bool = False

    @classmethod
    def for_device(cls, kind: str) -> EngineConfig:
        """Sizes for a kind of device: a GPU is idle with the pieces that keep a CPU busy."""
        if kind != "cuda":
            return cls()
        return cls(max_sequences=256, prefill_chunk=2048, prefill_chunk_alone=8192, tiles_per_step=64)

    def __post_init__(self) -> None:
        for name in ("max_sequences", "prefill_chunk", "prefill_chunk_alone", "tiles_per_step"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1; it is {getattr(self, name)}.")
        for name in ("kv_bytes", "prefix_bytes", "image_cache_bytes", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigurationError(f"{name} must not be negative; it is {value}.")
