"""Packed linears on the CPU kernels. K inputs, N outputs, F features of a SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smolvlm_fms.engine.kernels import loader, memory, packing
from smolvlm_fms.engine.kernels.registry import operator, require_bf16
from smolvlm_fms.errors import ConfigurationError, InputError
from smolvlm_fms.model.grouped import GroupedWeight

KINDS = {
    "bf16": loader.BF16,
    "bf16_compact": loader.BF16_COMPACT,
    "int8_channel": loader.INT8_CHANNEL,
    "int8": loader.INT8_GROUPS,
    "int4": loader.INT4_GROUPS,
}
ACTIVATIONS = {
    "none": loader.NO_ACTIVATION,
    "gelu_tanh": loader.GELU_TANH,
    "swiglu": loader.SWIGLU,
    "quick_gelu": loader.QUICK_GELU,
}
_INPUT_MULTIPLE = {
    loader.BF16: 2,
    loader.BF16_COMPACT: 2,
    loader.INT8_CHANNEL: 4,
    loader.INT8_GROUPS: 32,
    loader.INT4_GROUPS: 32,
}

_COMPACT_WORDS = 48  # of a row of a panel, which are 64 in "bf16"

_SCHEMA = (
    "packed_linear(Tensor x, Tensor packed, Tensor? scales, Tensor? bias, Tensor? residual, int kind, int outputs, "
    "int inputs, int activation, float scale, bool fp32_out) -> Tensor"
)


def _out_features(outputs: int, activation: int) -> int:
    return outputs // 2 if activation == loader.SWIGLU else outputs


def _packed_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: int,
    outputs: int,
    inputs: int,
    activation: int,
    scale: float,
    fp32_out: bool,
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[1] < inputs:
        flat = torch.nn.functional.pad(flat, (0, inputs - flat.shape[1]))
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    features = _out_features(outputs, activation)
    out = torch.empty((*x.shape[:-1], features), dtype=torch.float32 if fp32_out else torch.bfloat16)
    if not flat.shape[0]:
        return out
    residual = None if residual is None else residual.contiguous()
    weights = loader.Weights(kind, outputs, inputs, packed.data_ptr(), loader.pointer(scales), loader.pointer(bias))
    args = loader.LinearArgs(
        x=flat.data_ptr(),
        rows=flat.shape[0],
        x_stride=flat.stride(0),
        activation=activation,
        scale=scale,
        residual=loader.pointer(residual),
        out=None if fp32_out else out.data_ptr(),
        out_f32=out.data_ptr() if fp32_out else None,
        out_stride=features,
        threads=torch.get_num_threads(),
    )
    loader.check(loader.library().svk_linear(weights, args), "packed_linear")
    return out


def _packed_linear_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: int,
    outputs: int,
    inputs: int,
    activation: int,
    scale: float,
    fp32_out: bool,
) -> Tensor:
    features = _out_features(outputs, activation)
    return x.new_empty((*x.shape[:-1], features), dtype=torch.float32 if fp32_out else torch.bfloat16)


def _packed_rows(ids: Tensor, packed: Tensor, scales: Tensor | None, kind: int, outputs: int, inputs: int) -> Tensor:
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, inputs), dtype=torch.bfloat16)
    weights = loader.Weights(kind, outputs, inputs, packed.data_ptr(), loader.pointer(scales), None)
    if loader.library().svk_rows(weights, flat.data_ptr(), len(flat), out.data_ptr()) != loader.OK:
        raise IndexError(f"ids must lie in 0...{outputs - 1}; got {int(flat.min())}...{int(flat.max())}")
    return out


def _packed_rows_fake(
    ids: Tensor, packed: Tensor, scales: Tensor | None, kind: int, outputs: int, inputs: int
) -> Tensor:
    return packed.new_empty((*ids.shape, inputs), dtype=torch.bfloat16)


operator(_SCHEMA, _packed_linear, _packed_linear_fake)
operator(
    "packed_rows(Tensor ids, Tensor packed, Tensor? scales, int kind, int outputs, int inputs) -> Tensor",
    _packed_rows,
    _packed_rows_fake,
)


Weights = Tensor | GroupedWeight | Sequence[Tensor | GroupedWeight]


class PackedLinear(torch.nn.Module):
    """``residual + scale * activation(x W^T + bias)`` on weights packed once, for one row or thousands.

    kind         ``"bf16"``; ``"bf16_compact"``: the same numbers in 12 bits, see ``csrc/compact_format.h`` (weights
                 that are too uneven for it stay ``"bf16"``, and ``kind`` says so); ``"int8"`` or ``"int4"``: weights in
                 groups of 32 inputs with a bf16 scale each, while the activations keep 16 bits (few rows) or bf16;
                 ``"int8_channel"``: 8-bit weights (a scale an output) and 8-bit activations (a scale a row), the
                 fastest and least exact.
    activation   ``"none"``, ``"gelu_tanh"``, ``"quick_gelu"`` (CLIP's), or ``"swiglu"``: the weight is (2F, K), gates
                 before ups, and the answer silu(gate) * up has F features.
    weight       (N, K), or a sequence of such matrices over the same inputs (query, key, value; gate, up), which are
                 joined; ``bias`` likewise, with None for a part without one. GroupedWeights are packed as they are.
    """

    packed: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Weights,
        bias: Tensor | Sequence[Tensor | None] | None = None,
        *,
        kind: str = "bf16",
        activation: str = "none",
    ) -> None:
        """Raises: ConfigurationError for an unknown kind or activation, or parts that do not fit together."""
        super().__init__()
        if kind not in KINDS or activation not in ACTIVATIONS:
            raise ConfigurationError(
                f"kind is one of {[*KINDS]} and activation of {[*ACTIVATIONS]}; got {kind!r}, {activation!r}"
            )
        parts, joined_bias = _parts(weight, bias)
        rows = sum(part.shape[0] for part in parts)
        if activation == "swiglu" and rows % 2:
            raise ConfigurationError(f"a SwiGLU weight holds as many gates as ups; got {rows} rows")
        self.activation = activation
        self.out_features = _out_features(rows, ACTIVATIONS[activation])
        self.in_features = parts[0].shape[1]
        self._activation, self._outputs = ACTIVATIONS[activation], rows
        self._inputs = self.in_features + -self.in_features % _INPUT_MULTIPLE[KINDS[kind]]
        if activation == "swiglu" and joined_bias is not None:
            joined_bias = packing.interleave_gate_up(joined_bias)
        packed, scales = _pack(parts, kind, activation == "swiglu")
        self.kind = "bf16" if kind == "bf16_compact" and scales is None else kind
        self._kind = KINDS[self.kind]
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        if joined_bias is not None:
            joined_bias = packing.pad_to(joined_bias.float(), -1, packing.PANEL).contiguous()
        self.register_buffer("bias", joined_bias, persistent=False)

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, scale: float = 1.0, fp32_out: bool = False
    ) -> Tensor:
        """x (..., K) bf16 -> (..., N) bf16, or fp32 (logits, for instance). ``residual`` has the answer's shape, bf16.

        Raises: InputError for another dtype, device or shape.
        """
        require_bf16("x", x)
        if x.shape[-1] != self.in_features:
            raise InputError(f"x must end in {self.in_features} inputs; got {tuple(x.shape)}")
        if residual is not None:
            require_bf16("residual", residual)
            if residual.shape != (*x.shape[:-1], self.out_features):
                raise InputError(f"residual must be {(*x.shape[:-1], self.out_features)}; got {tuple(residual.shape)}")
        out: Tensor = torch.ops.smolvlm_fms.packed_linear(
            x,
            self.packed,
            self.scales,
            self.bias,
            residual,
            self._kind,
            self._outputs,
            self._inputs,
            self._activation,
            scale,
            fp32_out,
        )
        return out

    def c_weights(self) -> loader.Weights:
        """The structure that C functions take; valid while this module and its buffers live."""
        return loader.Weights(
            self._kind,
            self._outputs,
            self._inputs,
            self.packed.data_ptr(),
            loader.pointer(self.scales),
            loader.pointer(self.bias),
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, bf16 (*ids.shape, K): the embedding lookup of a tied head, without a second copy.

        Not for SwiGLU or int8_channel weights. Quantised rows come back as they are multiplied: value times scale.
        """
        if self.activation == "swiglu" or self.kind == "int8_channel":
            raise ConfigurationError("rows() is for an embedding: bf16, int8 or int4, without SwiGLU")
        rows: Tensor = torch.ops.smolvlm_fms.packed_rows(
            ids, self.packed, self.scales, self._kind, self._outputs, self._inputs
        )
        return rows[..., : self.in_features]

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, {self.kind}, {self.activation}, bias={self.bias is not None}"
        )


def _parts(
    weight: Weights, bias: Tensor | Sequence[Tensor | None] | None
) -> tuple[list[Tensor | GroupedWeight], Tensor | None]:
    parts = [weight] if isinstance(weight, Tensor | GroupedWeight) else list(weight)
    biases: list[Tensor | None] = [bias] if isinstance(bias, Tensor) else list(bias or [None] * len(parts))
    shapes = [tuple(part.shape) for part in parts]
    fits = len(parts) == len(biases) and all(len(shape) == 2 and shape[1] == shapes[0][1] for shape in shapes)
    if not fits or any(b is not None and b.shape != part.shape[:1] for part, b in zip(parts, biases, strict=False)):
        raise ConfigurationError(
            "weights must be (outputs, inputs) over the same inputs, each with its own bias or None; "
            f"got weights {shapes} and biases {[None if b is None else tuple(b.shape) for b in biases]}"
        )
    joined_bias = None
    if any(b is not None for b in biases):
        filled = [torch.zeros(part.shape[0]) if b is None else b for part, b in zip(parts, biases, strict=True)]
        joined_bias = torch.cat([b.detach().float() for b in filled])
    return [part.detach() for part in parts], joined_bias


def _pack(given: list[Tensor | GroupedWeight], kind: str, swiglu: bool) -> tuple[Tensor, Tensor | None]:
    parts = [part for part in given if isinstance(part, Tensor)]
    if len(parts) < len(given):
        return _pack_grouped([part for part in given if isinstance(part, GroupedWeight)], kind, swiglu)
    if kind.startswith("bf16"):
        return _pack_bf16(parts, swiglu, kind == "bf16_compact")
    weight_NK = torch.cat(parts) if len(parts) > 1 else parts[0]
    weight_NK = packing.interleave_gate_up(weight_NK) if swiglu else weight_NK
    if kind == "int8_channel":
        q, channel_scales = packing.quantize_channels(weight_NK)
        return packing.pack_int8(q, 4), packing.pad_to(channel_scales, -1, packing.PANEL).contiguous()
    q, group_scales = packing.quantize_groups(weight_NK, 8 if kind == "int8" else 4)
    packed = packing.pack_int8(q, packing.GROUP) if kind == "int8" else packing.pack_int4(q)
    return packed, packing.pack_group_scales(group_scales)


def _pack_grouped(parts: list[GroupedWeight], kind: str, swiglu: bool) -> tuple[Tensor, Tensor]:
    """Weights that were quantised before: their integers and scales, as they are."""
    bits = {"int8": 8, "int4": 4}.get(kind)
    if any(part.bits != bits for part in parts):
        raise ConfigurationError(f"weights of {parts[0].bits} bits cannot be packed as {kind}")
    whole = GroupedWeight.joined(parts)
    q_NK, scales_NG = whole.values_NK, whole.scales_NG
    if swiglu:
        q_NK, scales_NG = packing.interleave_gate_up(q_NK), packing.interleave_gate_up(scales_NG)
    packed = packing.pack_int8(q_NK, packing.GROUP) if bits == 8 else packing.pack_int4(q_NK)
    return packed, packing.pack_group_scales(scales_NG)


def _pack_bf16(parts: list[Tensor], swiglu: bool, compact: bool) -> tuple[Tensor, Tensor | None]:
    """``packing.pack_bf16`` of the joined (and, for SwiGLU, interleaved) parts, straight from where they lie. If
    ``compact``, in 12 bits with the list of exceptions, unless there are too many."""
    if not loader.built():
        joined = torch.cat(parts)
        return packing.pack_bf16(packing.interleave_gate_up(joined) if swiglu else joined), None
    parts = [part.to(torch.bfloat16).contiguous() for part in parts]
    width = parts[0].shape[1]
    rows_N = np.concatenate([part.data_ptr() + np.arange(len(part), dtype=np.int64) * (2 * width) for part in parts])
    if swiglu:
        rows_N = packing.interleave_gate_up(torch.from_numpy(rows_N)).numpy()
    rows_N = np.ascontiguousarray(np.pad(rows_N, (0, -len(rows_N) % packing.PANEL)))
    panels, pairs, threads = len(rows_N) // packing.PANEL, -(-width // 2), torch.get_num_threads()
    if compact:
        compacted = _pack_compact(rows_N, width, panels, pairs, threads)
        if compacted is not None:
            return compacted
    packed = memory.empty((panels, pairs, packing.PANEL), torch.int32)
    status = loader.library().svk_pack_bf16(rows_N.ctypes.data, len(rows_N), width, packed.data_ptr(), threads)
    loader.check(status, "pack_bf16")
    return packed, None


def _pack_compact(
    rows_N: np.ndarray, width: int, panels: int, pairs: int, threads: int
) -> tuple[Tensor, Tensor] | None:
    packed = memory.empty((panels, pairs, _COMPACT_WORDS), torch.int32)
    listed = torch.empty(2 * panels + 1 + 2 * panels * (pairs // 2 + 1), dtype=torch.int32)
    used = loader.library().svk_pack_bf16_compact(
        rows_N.ctypes.data, len(rows_N), width, packed.data_ptr(), listed.data_ptr(), threads
    )
    if used == loader.BAD_ARGUMENT:
        return None
    loader.check(min(used, loader.OK), "pack_bf16")
    return packed, listed[:used].clone()
