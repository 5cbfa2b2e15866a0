"""Linears for inference on the CPU that are packed once: our kernels' where they were built, else oneDNN's or torch's.

All answer ``residual + scale * activation(x W^T + bias)`` in bf16, and all hold the only copy of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.kernels.linear import Weights
from smolvlm_fms.engine.kernels.packing import quantize_groups
from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.model.grouped import GroupedWeight

__all__ = ["InferenceLinear", "OneDnnLinear", "make_linear"]

GROUP = 32
KINDS = ("bf16", "int8", "int4", "int8_channel")


class InferenceLinear(Protocol):
    """What the runners expect of a linear."""

    in_features: int
    out_features: int

    def __call__(
        self, x: Tensor, *, residual: Tensor | None = None, scale: float = 1.0, fp32_out: bool = False
    ) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor: ...


def make_linear(
    weight: Weights,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    kind: str = "bf16",
    activation: str = "none",
) -> nn.Module:
    """A packed linear of the best sort that there is here; arguments as those of ``kernels.PackedLinear``."""
    sort = kernels.PackedLinear if kernels.available() else OneDnnLinear
    return sort(weight, bias, kind=kind, activation=activation)


@cache
def _onednn_works() -> bool:
    """Whether oneDNN's packed linear can be had from this torch: its operators are private, so they are tried first."""
    try:
        x, weight = torch.randn(3, 40).bfloat16(), torch.randn(24, 40).bfloat16()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "swish", [], "")
        y = torch.ops.mkldnn._linear_pointwise.binary(x, y, packed, None, "mul")
        plain = x.float() @ weight.float().T
        return bool(torch.allclose(y.float(), F.silu(plain) * plain, rtol=0.05, atol=0.3))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


class OneDnnLinear(nn.Module):
    """The same contract as ``kernels.PackedLinear`` without our kernels. Quantised kinds are rounded to the same values
    and computed in bf16: they answer alike, but save no memory."""

    def __init__(
        self,
        weight: Weights,
        bias: Tensor | Sequence[Tensor | None] | None = None,
        *,
        kind: str = "bf16",
        activation: str = "none",
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigurationError(f"kind is one of {KINDS} without the CPU kernels; got {kind!r}")
        given = [weight] if isinstance(weight, Tensor | GroupedWeight) else list(weight)
        grouped = isinstance(given[0], GroupedWeight)
        parts = [part.wide().bfloat16() if isinstance(part, GroupedWeight) else part.detach() for part in given]
        biases = [bias] if isinstance(bias, Tensor) else list(bias or [None] * len(parts))
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if kind != "bf16" and not grouped:
            joined = _rounded(joined, kind)
        self.kind = kind
        self.activation = activation
        self.out_features = joined.shape[0] // (2 if activation == "swiglu" else 1)
        self.in_features = joined.shape[1]
        joined_bias = None
        if any(one is not None for one in biases):
            filled = [
                part.new_zeros(len(part)) if one is None else one for part, one in zip(parts, biases, strict=True)
            ]
            joined_bias = torch.cat([one.detach() for one in filled]).bfloat16()
        self.register_buffer("bias", joined_bias, persistent=False)
        self._packed: list[Any] = []  # SwiGLU: gates, then ups
        self._weight: Tensor | None = joined.bfloat16()
        if _onednn_works():
            halves = self._weight.chunk(2 if activation == "swiglu" else 1)
            self._packed = [torch.ops.mkldnn._reorder_linear_weight(half, None) for half in halves]
            self._weight = None

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, scale: float = 1.0, fp32_out: bool = False
    ) -> Tensor:
        """x (..., K) bf16 to (..., N) bf16, or fp32."""
        if not self._packed:
            y = self._by_torch(x)
        elif residual is not None and scale == 1.0 and self.activation == "none":
            bias: Any = self.bias
            return _fp32(torch.ops.mkldnn._linear_pointwise.binary(x, residual, *self._packed, bias, "add"), fp32_out)
        else:
            y = self._by_onednn(x)
        if self.activation == "quick_gelu":
            y = y * torch.sigmoid(1.702 * y)
        if residual is not None:
            y = torch.add(residual, y, alpha=scale)
        elif scale != 1.0:
            y = y * scale
        return _fp32(y, fp32_out)

    def _by_torch(self, x: Tensor) -> Tensor:
        assert self._weight is not None
        bias: Any = self.bias
        y = F.linear(x, self._weight, bias)
        if self.activation == "swiglu":
            gate, up = y.chunk(2, -1)
            return F.silu(gate).mul_(up)
        return F.gelu(y, approximate="tanh") if self.activation == "gelu_tanh" else y

    def _by_onednn(self, x: Tensor) -> Tensor:
        """The activation is part of the product where oneDNN knows it: SwiGLU's as that of the gates, by which the
        ups are multiplied as they come."""
        linear: Any = torch.ops.mkldnn._linear_pointwise
        bias: Any = self.bias
        if self.activation == "swiglu":
            gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
            gate = linear(x, self._packed[0], gate_bias, "swish", [], "")
            y: Tensor = linear.binary(x, gate, self._packed[1], up_bias, "mul")
            return y
        after: Any = ("gelu", [], "tanh") if self.activation == "gelu_tanh" else ("none", [], "")
        y = linear(x, *self._packed, bias, *after)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, bf16 (*ids.shape, K)."""
        if self._weight is None:
            self._weight = torch.cat([half.to_dense().bfloat16() for half in self._packed])
        return F.embedding(ids, self._weight)


def _fp32(y: Tensor, wanted: bool) -> Tensor:
    return y.float() if wanted else y


def _rounded(weight_NK: Tensor, kind: str) -> Tensor:
    """Weights as the quantised kinds hold them, back in bf16."""
    if kind == "int8_channel":
        scale = weight_NK.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        return ((weight_NK.float() / scale).round() * scale).bfloat16()
    q, scales = quantize_groups(weight_NK, 8 if kind == "int8" else 4)
    wide = q.float() * scales.float().repeat_interleave(GROUP, 1)[:, : q.shape[1]]
    return wide.bfloat16()
