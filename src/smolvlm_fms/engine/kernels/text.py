"""The text model on the CPU kernels: a decode step or a chunk of prefill in one call.

B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvlm_fms.engine.kernels import loader
from smolvlm_fms.engine.kernels.cache import PackedCache, c_cache
from smolvlm_fms.engine.kernels.linear import PackedLinear
from smolvlm_fms.engine.kernels.registry import operator, require_bf16
from smolvlm_fms.errors import ConfigurationError, InputError

_handles = itertools.count()
_models: weakref.WeakValueDictionary[int, PackedText] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class PackedLayer:
    """One decoder layer. ``qkv`` joins query, key and value; ``gate_up`` is a SwiGLU of gate and up; norms are (D,)."""

    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    attention_norm: Tensor
    mlp_norm: Tensor


class _Call:
    """The arguments of decode steps of ``rows`` sequences, and where their answers go."""

    def __init__(self, vocabulary: int, rows: int, banned: Sequence[int]) -> None:
        if not rows or any(not 0 <= token < vocabulary for token in banned):
            raise InputError(f"a step has rows, and banned tokens are of 0...{vocabulary - 1}; got {rows}, {[*banned]}")
        self.rows, self.banned = rows, banned
        self.logits_BV = torch.empty((rows, vocabulary), dtype=torch.float32)
        self.ids, self.positions, self.starts, self.best = ((ctypes.c_int64 * rows)() for _ in range(4))
        self._banned = (ctypes.c_int64 * len(banned))(*banned)
        at = ctypes.addressof
        self.args = loader.StepArgs(
            ids=at(self.ids),
            positions=at(self.positions),
            starts=at(self.starts),
            banned=at(self._banned),
            banned_count=len(banned),
            logits=self.logits_BV.data_ptr(),
            best=at(self.best),
            rows=rows,
        )


class PackedText:
    """A Llama- or Granite-shaped text model, bf16, int8 or int4, whose weights are packed once for prefill and decode.

    cos, sin        fp32 (positions, head_dim / 2), see ``cache.rope_tables``
    interleaved     True: query and key weights rotate pairs (2i, 2i + 1), as FMS holds them; False: (i, i + D/2), as
                    transformers does
    embeddings      bf16 (vocabulary, width); None: the head's rows, to which they are tied
    attention_scale 1 / sqrt(head_dim) by default; the other scales are Granite's: embeddings *, what a block adds to
                    the residual stream *, logits *
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        final_norm: Tensor,
        head: PackedLinear,
        *,
        embeddings: Tensor | None = None,
        heads: int,
        kv_heads: int,
        head_dim: int,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        interleaved: bool = True,
        attention_scale: float | None = None,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
        logits_scale: float = 1.0,
    ) -> None:
        """Raises: ConfigurationError for sizes that do not fit together or kinds that a text model cannot have."""
        self.layers, self.head = tuple(layers), head
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.width, self.vocabulary = head.in_features, head.out_features
        self._check(cos, sin)
        self.positions = cos.shape[0]
        norms = [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)]
        self._floats = [tensor.detach().float().contiguous() for tensor in (*norms, final_norm, cos, sin)]
        *norm_floats, final_norm, cos, sin = self._floats
        array = (loader.Layer * len(self.layers))()
        for i, layer in enumerate(self.layers):
            parts = (layer.qkv, layer.out, layer.gate_up, layer.down)
            pointers = [norm.data_ptr() for norm in norm_floats[2 * i : 2 * i + 2]]
            array[i] = loader.Layer(*(part.c_weights() for part in parts), *pointers)
        self._array = array
        self._embeddings = None if embeddings is None else embeddings.detach().bfloat16().contiguous()
        self._call: _Call | None = None
        self._decode = loader.library().svk_decode
        self.c_model = loader.TextModel(
            layers=len(self.layers),
            width=self.width,
            heads=heads,
            kv_heads=kv_heads,
            d=head_dim,
            ff=self.layers[0].gate_up.out_features,
            layer=array,
            final_norm=final_norm.data_ptr(),
            embeddings=loader.pointer(self._embeddings),
            head=head.c_weights(),
            rope=loader.Rope(cos.data_ptr(), sin.data_ptr(), int(interleaved)),
            eps=eps,
            attention_scale=head_dim**-0.5 if attention_scale is None else attention_scale,
            embedding_scale=embedding_scale,
            residual_scale=residual_scale,
            logits_scale=logits_scale,
        )
        self.handle = next(_handles)
        _models[self.handle] = self

    def _check(self, cos: Tensor, sin: Tensor) -> None:
        attended = self.heads * self.head_dim
        joined = attended + 2 * self.kv_heads * self.head_dim
        ff = self.layers[0].gate_up.out_features if self.layers else 0
        for layer in self.layers:
            sizes = {
                "qkv": (layer.qkv, self.width, joined, "none"),
                "out": (layer.out, attended, self.width, "none"),
                "gate_up": (layer.gate_up, self.width, ff, "swiglu"),
                "down": (layer.down, ff, self.width, "none"),
            }
            for name, (part, inputs, outputs, activation) in sizes.items():
                came = (part.in_features, part.out_features, part.activation)
                if came != (inputs, outputs, activation) or part.kind == "int8_channel":
                    wanted = f"{inputs} -> {outputs}, {activation}, bf16, int8 or int4"
                    raise ConfigurationError(
                        f"{name} must be {wanted}; it is {came[0]} -> {came[1]}, {came[2]}, {part.kind}"
                    )
        if not self.layers or self.heads % self.kv_heads or self.head.kind == "int8_channel":
            raise ConfigurationError(
                "a text model has layers, query heads in whole groups, and a head of bf16, int8 or int4; got "
                f"{len(self.layers)} layers, {self.heads} heads on {self.kv_heads}, {self.head.kind}"
            )
        if cos.shape != sin.shape or cos.shape[1:] != (self.head_dim // 2,):
            raise ConfigurationError(f"cos and sin are (positions, {self.head_dim // 2}); got {tuple(cos.shape)}")

    def new_cache(self, tokens: int) -> PackedCache:
        """A cache that fits this model, of ``tokens`` positions (whole blocks of 64)."""
        return PackedCache(len(self.layers), self.kv_heads, self.head_dim, tokens)

    def decode(self, hidden_BD: Tensor, positions_B: Tensor, starts_B: Tensor, cache: PackedCache) -> Tensor:
        """One token for each of B sequences: embeddings (B, D) bf16 -> logits (B, V) fp32.

        ``positions_B`` (int64): the token's position in its sequence; ``starts_B`` (int64): where the sequence's run of
        the cache starts. A row's logits do not depend on the other rows, nor on the number of threads.

        Raises: InputError for shapes, dtypes or positions that do not fit.
        """
        self._check_hidden(hidden_BD)
        for name, tensor in (("positions", positions_B), ("starts", starts_B)):
            if tensor.dtype != torch.int64 or tensor.shape != hidden_BD.shape[:1]:
                raise InputError(f"{name} must be int64 ({len(hidden_BD)},); got {tensor.dtype} {tuple(tensor.shape)}")
        for position, start in zip(positions_B.tolist(), starts_B.tolist(), strict=True):
            self._check_range(position, position + 1, start, cache)
        logits: Tensor = torch.ops.smolvlm_fms.text_decode(
            hidden_BD, positions_B, starts_B, cache.keys, cache.values, self.handle, self.vocabulary
        )
        return logits

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        starts: Sequence[int],
        cache: PackedCache,
        banned: Sequence[int] = (),
    ) -> tuple[Tensor, list[int]]:
        """``decode`` from B tokens in plain Python, the engine's way: logits (B, V) fp32, in memory that the next step
        uses again, and the likeliest token of each row. ``banned`` tokens have logits of -infinity.

        Torch's operators on single numbers, and whatever else Python touches between two steps, come from memory, as
        a step leaves nothing in the caches: a tenth of its time. So little is done here, and what can be is kept.

        Raises: InputError for tokens or positions that do not fit.
        """
        for position, start in zip(positions, starts, strict=True):
            self._check_range(position, position + 1, start, cache)
        call = self._call
        if call is None or call.rows != len(ids) or call.banned != banned:
            call = self._call = _Call(self.vocabulary, len(ids), banned)
        if len(ids) != len(positions) or min(ids) < 0 or max(ids) >= self.vocabulary:
            raise InputError(f"one token of 0...{self.vocabulary - 1} for each of the positions; got {[*ids]}")
        call.ids[:], call.positions[:], call.starts[:] = [*ids], [*positions], [*starts]
        call.args.threads = torch.get_num_threads()
        loader.check(self._decode(self.c_model, cache.c_cache, call.args), "text_decode")
        return call.logits_BV, call.best[:]

    def prefill(
        self,
        hidden_TD: Tensor,
        position: int,
        start: int,
        cache: PackedCache,
        *,
        logits: bool = True,
        normed: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """T tokens of one sequence, the first at ``position``: embeddings (T, D) bf16 -> normed hidden states (T, D)
        bf16 (empty without ``normed``, which saves most of the last layer) and the last token's logits (V,) fp32
        (empty without ``logits``).

        Earlier positions are read from the cache, whose run of this sequence starts at ``start``.

        Raises: InputError for shapes, dtypes or positions that do not fit.
        """
        self._check_hidden(hidden_TD)
        self._check_range(position, position + len(hidden_TD), start, cache)
        vocabulary = self.vocabulary if logits else 0
        states, last = torch.ops.smolvlm_fms.text_prefill(
            hidden_TD, position, start, cache.keys, cache.values, self.handle, vocabulary, normed
        )
        return states, last

    def _check_hidden(self, hidden: Tensor) -> None:
        require_bf16("hidden", hidden)
        if hidden.dim() != 2 or hidden.shape[1] != self.width or not len(hidden):
            raise InputError(
                f"hidden must be (tokens, {self.width}) with at least one token; got {tuple(hidden.shape)}"
            )

    def _check_range(self, position: int, end: int, start: int, cache: PackedCache) -> None:
        if (cache.layers, cache.kv_heads, cache.head_dim) != (len(self.layers), self.kv_heads, self.head_dim):
            raise InputError("this cache was made for another model; use new_cache()")
        if position < 0 or end > self.positions:
            raise InputError(f"positions {position} … {end} are outside the {self.positions} of the rotation tables")
        cache.check_positions(start, end)


def _text_decode(
    hidden: Tensor, positions: Tensor, starts: Tensor, keys: Tensor, values: Tensor, handle: int, vocabulary: int
) -> Tensor:
    hidden, positions, starts = hidden.contiguous(), positions.contiguous(), starts.contiguous()
    logits = torch.empty((len(hidden), vocabulary), dtype=torch.float32)
    args = loader.StepArgs(
        hidden=hidden.data_ptr(),
        positions=positions.data_ptr(),
        starts=starts.data_ptr(),
        logits=logits.data_ptr(),
        rows=len(hidden),
        threads=torch.get_num_threads(),
    )
    loader.check(loader.library().svk_decode(_models[handle].c_model, c_cache(keys, values), args), "text_decode")
    return logits


def _text_decode_fake(
    hidden: Tensor, positions: Tensor, starts: Tensor, keys: Tensor, values: Tensor, handle: int, vocabulary: int
) -> Tensor:
    return hidden.new_empty((hidden.shape[0], vocabulary), dtype=torch.float32)


def _text_prefill(
    hidden: Tensor, position: int, start: int, keys: Tensor, values: Tensor, handle: int, vocabulary: int, states: bool
) -> tuple[Tensor, Tensor]:
    hidden = hidden.contiguous()
    normed = hidden.new_empty((len(hidden) if states else 0, hidden.shape[1]))
    logits = torch.empty(vocabulary, dtype=torch.float32)
    place = torch.tensor([position, start])
    args = loader.StepArgs(
        hidden=hidden.data_ptr(),
        positions=place.data_ptr(),
        starts=place[1:].data_ptr(),
        logits=logits.data_ptr() if vocabulary else None,
        normed=normed.data_ptr() if states else None,
        rows=len(hidden),
        threads=torch.get_num_threads(),
    )
    loader.check(loader.library().svk_prefill(_models[handle].c_model, c_cache(keys, values), args), "text_prefill")
    return normed, logits


def _text_prefill_fake(
    hidden: Tensor, position: int, start: int, keys: Tensor, values: Tensor, handle: int, vocabulary: int, states: bool
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((hidden.shape[0] if states else 0, hidden.shape[1])), hidden.new_empty(
        (vocabulary,), dtype=torch.float32
    )


operator(
    "text_decode(Tensor hidden, Tensor positions, Tensor starts, Tensor(a!) keys, Tensor(b!) values, int model, "
    "int vocabulary) -> Tensor",
    _text_decode,
    _text_decode_fake,
)
operator(
    "text_prefill(Tensor hidden, int position, int start, Tensor(a!) keys, Tensor(b!) values, int model, "
    "int vocabulary, bool states) -> (Tensor, Tensor)",
    _text_prefill,
    _text_prefill_fake,
)
