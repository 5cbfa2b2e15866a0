"""Keys and values in the layout that the attention kernels read (``csrc/svk.h``), and the tables of their rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from smolvlm_fms.engine.kernels import loader
from smolvlm_fms.errors import CapacityError, ConfigurationError, InputError

BLOCK = 64  # positions side by side


class PackedCache:
    """Keys and values of all layers: ``tokens`` cache positions, of which each sequence owns a run of whole blocks.

    A sequence whose run starts at cache position ``start`` (a multiple of 64) keeps its position p at ``start + p``.
    The memory is not cleared: nothing reads a position that was not written, and pages are touched only as they fill.

    keys    int32 (layers, kv_heads, blocks, D/2, 64): 64 positions side by side, two bf16 of each in a word
    values  int32 (layers, kv_heads, blocks, 32, D rounded up to 16): two positions in a word
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int) -> None:
        """Raises: ConfigurationError for an odd or too large head_dim; CapacityError where there is no memory."""
        if head_dim % 2 or not 0 < head_dim <= 256:
            raise ConfigurationError(f"the kernels need an even head_dim up to 256; it is {head_dim}")
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.tokens = tokens // BLOCK * BLOCK
        blocks = self.tokens // BLOCK
        try:
            self.keys = torch.empty((layers, kv_heads, blocks, head_dim // 2, BLOCK), dtype=torch.int32)
            self.values = torch.empty(
                (layers, kv_heads, blocks, BLOCK // 2, -(-head_dim // 16) * 16), dtype=torch.int32
            )
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(f"no memory for {tokens} tokens of keys and values; keep fewer. ({error})") from error
        self.c_cache = c_cache(self.keys, self.values)

    @staticmethod
    def bytes_per_token(layers: int, kv_heads: int, head_dim: int) -> int:
        """Memory that one position takes, over all layers."""
        return layers * kv_heads * 2 * (head_dim + -(-head_dim // 16) * 16)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies ``tokens`` positions between runs that start at the cache positions ``source`` and ``target``."""
        self._check_run(source, tokens)
        self._check_run(target, tokens)
        blocks = -(-tokens // BLOCK)
        for tensor in (self.keys, self.values):
            first, to = source // BLOCK, target // BLOCK
            tensor[:, :, to : to + blocks] = tensor[:, :, first : first + blocks]

    def read(self, layer: int, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of a sequence's first positions: two bf16 tensors (tokens, kv_heads, D)."""
        self._check_run(start, tokens)
        blocks = slice(start // BLOCK, start // BLOCK + -(-tokens // BLOCK))
        keys = self.keys[layer, :, blocks].transpose(2, 3).contiguous().view(torch.bfloat16)
        values = self.values[layer, :, blocks].contiguous().view(torch.bfloat16)
        values = values.view(self.kv_heads, -1, values.shape[-1] // 2, 2).transpose(2, 3)
        keys_HTD = keys.reshape(self.kv_heads, -1, self.head_dim)
        values_HTD = values.reshape(self.kv_heads, keys_HTD.shape[1], -1)[..., : self.head_dim]
        return keys_HTD[:, :tokens].transpose(0, 1), values_HTD[:, :tokens].transpose(0, 1)

    def check_positions(self, start: int, end: int) -> None:
        """Raises: InputError where a sequence that starts at ``start`` cannot have ``end`` positions."""
        self._check_run(start, end)

    def _check_run(self, start: int, tokens: int) -> None:
        if start % BLOCK or start < 0 or tokens < 0 or start + tokens > self.tokens:
            raise InputError(
                f"a run of the cache starts at a multiple of {BLOCK} and ends within its {self.tokens} positions; "
                f"got {tokens} positions from {start}"
            )


def c_cache(keys: Tensor, values: Tensor) -> loader.Cache:
    """``svk_cache`` for the two tensors of a PackedCache."""
    return loader.Cache(
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        key_layer=keys.stride(0),
        key_head=keys.stride(1),
        value_layer=values.stride(0),
        value_head=values.stride(1),
        tokens=keys.shape[2] * BLOCK,
    )


def rope_tables(frequencies_D2: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 (positions, D/2), of position times frequency (theta ** (-2i / D), scaled or not)."""
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies_D2.double()[None]
    return angles.cos().float(), angles.sin().float()
