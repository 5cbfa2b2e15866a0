"""bf16 weights in 12 bits are the weights, and their answers those of plain panels, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import smolvlm_fms as sv
from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.kernels import packing
from tests.unit.test_kernels_linear import runnable_isas

pytestmark = pytest.mark.skipif(not kernels.built(), reason="the CPU kernels were not built here")


def weights(outputs: int, inputs: int, outliers: int) -> Tensor:
    """Normal weights with some that no code has: huge, tiny, denormal, infinite, not a number, both zeros."""
    generator = torch.Generator().manual_seed(outputs * inputs + outliers)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    strange = torch.tensor([3e38, -3e38, 1e-30, -1e-38, 9e-41, -9e-41, torch.inf, torch.nan, 0.0, -0.0, 2e4, 1e-6])
    places = torch.randperm(weight.numel(), generator=generator)[:outliers]
    weight.view(-1)[places] = strange.repeat(-(-outliers // len(strange)))[:outliers].bfloat16()
    return weight


def both(weight: Tensor | list[Tensor], **options: Any) -> Iterator[kernels.PackedLinear]:
    for kind in ("bf16", "bf16_compact"):
        yield kernels.PackedLinear(weight, kind=kind, **options)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (130, 70), (34, 33), (16, 1), (322, 192), (96, 576)])
def test_answers_are_those_of_plain_panels_to_the_bit(isa: str, outputs: int, inputs: int) -> None:
    outliers = outputs * inputs // 300
    for activation, few in product(("none", "swiglu"), (0, outliers)):
        plain, compact = both(weights(outputs, inputs, few), activation=activation)
        assert compact.kind == "bf16_compact" and compact.packed.nbytes * 4 == plain.packed.nbytes * 3
        with kernels.use_isa(isa):
            for rows in (1, 2, 5, 6, 7, 8, 9, 15, 16, 33, 64, 100):
                x = torch.randn(rows, inputs).bfloat16()
                for fp32 in (False, True):
                    assert torch.equal(bits(compact(x, fp32_out=fp32)), bits(plain(x, fp32_out=fp32)))


@pytest.mark.parametrize("isa", runnable_isas())
def test_every_instruction_set_packs_the_same(isa: str) -> None:
    weight = weights(200, 130, 40)
    want = kernels.PackedLinear(weight, kind="bf16_compact")
    with kernels.use_isa(isa):
        got = kernels.PackedLinear(weight, kind="bf16_compact")
    assert got.scales is not None and want.scales is not None
    assert torch.equal(got.packed, want.packed) and torch.equal(got.scales, want.scales)


def test_no_bit_is_lost_in_any_place() -> None:
    """Every bf16 number there is, among weights that have codes; read back as an embedding's rows."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for part in every.split(2**10):
        weight = torch.randn(3200, 256).bfloat16()
        weight.view(-1)[torch.randperm(weight.numel())[: len(part)]] = part
        linear = kernels.PackedLinear(weight, kind="bf16_compact")
        assert linear.kind == "bf16_compact"
        assert torch.equal(bits(linear.rows(torch.arange(3200))), bits(weight))


def test_weights_of_too_many_sizes_stay_plain() -> None:
    """One exponent is as common as any other: most words would be exceptions."""
    weight = (torch.rand(64, 64) * 200 - 100).exp2().bfloat16()
    plain, compact = both(weight)
    assert compact.kind == "bf16" and compact.scales is None
    assert torch.equal(compact.packed, plain.packed)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(compact(x), plain(x))


def test_joined_parts_swiglu_and_bias() -> None:
    parts = [weights(70, 33, 0), weights(70, 33, 6)]
    bias = [torch.randn(70), torch.randn(70)]
    x = torch.randn(9, 33).bfloat16()
    plain, compact = both(parts, bias=bias, activation="swiglu")
    assert torch.equal(bits(compact(x)), bits(plain(x)))


@pytest.mark.skipif(kernels.isa() != "avx512", reason="compact weights are unpacked by AVX-512 only")
def test_the_engine_holds_its_text_compact_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = sv.load("demo", dtype="bfloat16")
    monkeypatch.setattr("smolvlm_fms.engine.packed.COMPACT", {})
    plain = sv.load("demo", dtype="bfloat16")
    kinds = [
        {part.kind for part in one.model.text_model.modules() if isinstance(part, kernels.PackedLinear)}
        for one in (vlm, plain)
    ]
    assert kinds == [{"bf16_compact"}, {"bf16"}]
    picture = torch.randint(0, 256, (200, 300, 3), dtype=torch.uint8).numpy()
    said, plainly = (
        one.ask(Image.fromarray(picture), "What is it?", max_tokens=12, logprobs=3, ignore_eos=True)
        for one in (vlm, plain)
    )
    assert said.text == plainly.text and said.tokens == plainly.tokens


def test_no_rows_are_no_rows() -> None:
    linear = kernels.PackedLinear(torch.randn(150, 64), kind="bf16_compact")
    assert linear.rows(torch.zeros(0, dtype=torch.int64)).shape == (0, 64)


def test_listed_words_are_in_order_and_whole() -> None:
    weight = torch.ones(64, 64).bfloat16()
    weight[3, 10], weight[3, 11], weight[40, 2] = 1e30, 5.0, -1e-30
    linear = kernels.PackedLinear(weight, kind="bf16_compact")
    assert linear.scales is not None
    base, first, last, *listed = linear.scales.tolist()
    assert 1 <= 127 - base <= 15 and (first, last) == (0, 2)
    plain = packing.pack_bf16(weight).flatten()
    places = [1 * 64 + 40, 5 * 64 + 3]
    assert listed == [places[0], int(plain[places[0]]), places[1], int(plain[places[1]])]
