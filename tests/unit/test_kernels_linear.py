"""Packed linears of every kind and instruction set against fp64, at sizes that fill no panel, tile or group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.kernels import packing
from smolvlm_fms.errors import ConfigurationError, InputError

pytestmark = pytest.mark.skipif(not kernels.built(), reason="the CPU kernels were not built here")


def runnable_isas() -> list[str]:
    """The instruction sets that this machine can run, best first."""
    return [name for name in ("avx512", "avx2", "neon", "portable") if kernels.built() and runs(name)]


def runs(isa: str) -> bool:
    try:
        with kernels.use_isa(isa):
            return True
    except ConfigurationError:
        return False


def reference(weight: Tensor, bias: Tensor | None, x: Tensor, activation: str) -> Tensor:
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    if activation == "swiglu":
        gate, up = y.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    return y


def effective_weight(weight: Tensor, kind: str) -> Tensor:
    """What the kernel multiplies: the weight after quantisation, from the quantiser alone (not from the packing)."""
    if kind.startswith("bf16"):
        return weight.bfloat16()
    if kind == "int8_channel":
        q, scale = packing.quantize_channels(weight)
        return q.double() * scale.double()[:, None]
    q, scale = packing.quantize_groups(weight, 8 if kind == "int8" else 4)
    return q.double() * scale.double().repeat_interleave(32, 1)[:, : weight.shape[1]]


# Relative to the answer's standard deviation: bf16 results round to 2^-9 of their own size (up to 4 deviations away);
# 8-bit activations add their own step.
TOLERANCE = {"bf16": 0.02, "bf16_compact": 0.02, "int8": 0.02, "int4": 0.02, "int8_channel": 0.08}


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8_channel", "int8", "int4"])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "quick_gelu", "swiglu"])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (130, 70), (34, 33), (322, 192)])
def test_close_to_fp64_for_1_to_33_rows(isa: str, kind: str, activation: str, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator) if activation != "none" else None
    linear = kernels.PackedLinear(weight, bias, kind=kind, activation=activation)
    effective = effective_weight(weight, kind)
    with kernels.use_isa(isa):
        for rows in (1, 2, 3, 5, 6, 7, 12, 33):
            x = torch.randn(rows, inputs, generator=generator).bfloat16()
            residual = torch.randn(rows, linear.out_features, generator=generator).bfloat16()
            want = reference(effective, bias, x, activation) * 0.5 + residual.double()
            got = linear(x, residual=residual, scale=0.5)
            assert got.shape == want.shape
            assert (got.double() - want).abs().max() < TOLERANCE[kind] * want.std()


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "swiglu"])
def test_activations_hold_over_their_whole_range(isa: str, activation: str) -> None:
    """An identity as the weight: what comes out is the function of what goes in, in fp32."""
    eye = torch.eye(64)
    linear = kernels.PackedLinear([eye, eye] if activation == "swiglu" else eye, activation=activation)
    curve = torch.cat((torch.linspace(-30, 30, 58), torch.tensor([-1e4, 1e4, -88.5, 0.0, 1e-40, 150.0]))).bfloat16()
    x = curve.expand(7, 64).clone()
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    with kernels.use_isa(isa):
        got = linear(x, fp32_out=True).double()
    want = reference(torch.cat([eye, eye]) if activation == "swiglu" else eye, None, curve[None], activation)[0]
    for row in (0, 3, 6):
        assert torch.all((got[row] - want).abs() <= 2e-5 * want.abs() + 1e-14)  # 1 + tanh is no more exact
    assert not got[1].isfinite().any() and not got[2].isfinite().any()  # infinity times the identity's zeros


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8", "int4"])
def test_fp32_answers_are_exact_where_the_sums_are(isa: str, kind: str) -> None:
    """Small integers: every product and sum is exact, so packing, tails and signs have nowhere to hide."""
    generator = torch.Generator().manual_seed(0)
    for rows, outputs, inputs in [(1, 65, 32), (4, 64, 96), (13, 97, 64), (26, 200, 160)]:
        weight = torch.randint(-7, 8, (outputs, inputs), generator=generator).float()
        weight[:, ::32] = -8.0 if kind == "int4" else 127.0  # so that every group's scale is exactly one
        x = torch.randint(-3, 4, (rows, inputs), generator=generator).bfloat16()
        with kernels.use_isa(isa):
            got = kernels.PackedLinear(weight, kind=kind)(x, fp32_out=True)
        want = x.double() @ weight.double().T
        # 16-bit activations: x / scale is not whole
        bound = 0.0 if kind.startswith("bf16") else 2e-5 * 127 * inputs * 3
        assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("isa", runnable_isas())
def test_weight_only_kinds_keep_activations_better_than_bf16(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 512, generator=generator) / 512**0.5
    x = torch.randn(3, 512, generator=generator).bfloat16()
    x[:, 7] = 60.0  # an outlier, as language models have them
    with kernels.use_isa(isa):
        got = kernels.PackedLinear(weight, kind="int8")(x, fp32_out=True).double()
    want = x.double() @ effective_weight(weight, "int8").T
    assert (got - want).norm() / want.norm() < 1e-4


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8_channel", "int8", "int4"])
def test_extreme_values_stay_in_their_row(isa: str, kind: str) -> None:
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(2))
    x = torch.randn(14, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[1, 3] = torch.inf
    x[2, 5] = torch.nan
    x[3] = 1e-40  # denormal
    x[4] = -0.0
    x[5] = 3e38
    linear = kernels.PackedLinear(weight, kind=kind)
    with kernels.use_isa(isa):
        got, few = linear(x, fp32_out=True), linear(x[:6], fp32_out=True)
        clean = linear(torch.where(torch.isfinite(x), x, 0.0), fp32_out=True)
    for answer in (got, few):
        assert not answer[1].isfinite().any()
        assert not answer[2].isfinite().any()
        assert answer[3].abs().max() < 1e-35
        assert answer[4].abs().max() == 0
        assert answer[0].isfinite().all()
    assert torch.equal(got[6:], clean[6:])


@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8_channel", "int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours_or_threads(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    linear = kernels.PackedLinear(torch.randn(200, 96, generator=generator), kind=kind)
    x = torch.randn(11, 96, generator=generator).bfloat16()
    together = linear(x, fp32_out=True)
    alone = torch.cat([linear(x[i : i + 1], fp32_out=True) for i in range(11)])
    assert torch.equal(together, alone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x, fp32_out=True), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("sizes", "inputs"), [((64,), 32), ((70, 3, 2), 33), ((5,), 1), ((640, 128), 130)])
def test_bf16_panels_are_those_of_the_plain_transposition(sizes: tuple[int, ...], inputs: int) -> None:
    """The C packing reads rows where they lie; ``packing.pack_bf16`` joins and transposes with torch."""
    torch.manual_seed(0)
    wide = [torch.randn(size, inputs + 7).bfloat16() for size in sizes]
    parts = [part[:, 3 : inputs + 3] for part in wide]  # not contiguous
    packed = kernels.PackedLinear(parts).packed
    assert torch.equal(packed, packing.pack_bf16(torch.cat(parts)))
    gates = kernels.PackedLinear([parts[0], parts[0] * 2], activation="swiglu").packed
    assert torch.equal(gates, packing.pack_bf16(packing.interleave_gate_up(torch.cat([parts[0], parts[0] * 2]))))


def test_parts_are_joined_and_strides_respected() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(64, 32, generator=generator), torch.randn(20, 32, generator=generator)
    bias = torch.randn(20, generator=generator)
    x = torch.randn(9, 2, 48, generator=generator).bfloat16()[:, 0, :32]
    got = kernels.PackedLinear([q, k], [None, bias])(x)
    want = torch.cat([x.double() @ q.bfloat16().double().T, x.double() @ k.bfloat16().double().T + bias], 1)
    assert (got.double() - want).abs().max() < 0.02 * want.std()


@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8", "int4"])
def test_rows_look_up_a_tied_embedding(kind: str) -> None:
    weight = torch.randn(150, 64, generator=torch.Generator().manual_seed(6))
    ids = torch.tensor([[0, 63, 64], [149, 7, 128]])
    got = kernels.PackedLinear(weight, kind=kind).rows(ids)
    assert torch.equal(got, effective_weight(weight, kind)[ids].bfloat16())


def test_four_bits_are_no_worse_than_plain_rounding() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    groups = weight.unflatten(1, (-1, 32))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    plain = (groups / (extreme / -8)).round().clamp(-8, 7) * (extreme / -8)
    ours = effective_weight(weight, "int4")
    assert (ours - weight).square().mean() < 0.95 * (plain.flatten(1) - weight).square().mean()


def test_compile_keeps_the_operator_as_one_node() -> None:
    linear = kernels.PackedLinear(torch.randn(40, 32), activation="gelu_tanh")
    x = torch.randn(3, 5, 32).bfloat16()
    exported = torch.export.export(torch.nn.Sequential(linear), (x,))
    assert any("packed_linear" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), linear(x))


def test_wrong_inputs_are_named() -> None:
    linear = kernels.PackedLinear(torch.randn(8, 16))
    with pytest.raises(InputError, match=r"bf16 on the CPU; got torch\.float32"):
        linear(torch.randn(1, 16))
    with pytest.raises(InputError, match="end in 16 inputs"):
        linear(torch.randn(1, 15).bfloat16())
    with pytest.raises(InputError, match="residual must be"):
        linear(torch.randn(2, 16).bfloat16(), residual=torch.randn(2, 9).bfloat16())
    with pytest.raises(ConfigurationError, match="got 'int3'"):
        kernels.PackedLinear(torch.randn(8, 16), kind="int3")
    with pytest.raises(ConfigurationError, match="over the same inputs"):
        kernels.PackedLinear([torch.randn(8, 16), torch.randn(8, 15)])
    with pytest.raises(ConfigurationError, match="as many gates as ups"):
        kernels.PackedLinear(torch.randn(7, 16), activation="swiglu")
    assert linear(torch.empty(0, 16, dtype=torch.bfloat16)).shape == (0, 8)
