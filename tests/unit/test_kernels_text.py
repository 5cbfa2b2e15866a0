"""Prefill and decode of a whole text model against an fp64 model written here, in every kind and instruction set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.kernels import packing
from smolvlm_fms.errors import ConfigurationError, InputError
from tests.unit.test_kernels_linear import runnable_isas

pytestmark = pytest.mark.skipif(not kernels.built(), reason="the CPU kernels were not built here")


@dataclass(frozen=True)
class Shape:
    """Sizes of a small model, odd where the families are odd (head_dim 72, unequal groups, Granite's multipliers)."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocabulary: int = 150
    layers: int = 2
    interleaved: bool = True
    scales: dict[str, float] = field(default_factory=dict)


SHAPES = {
    "grouped": Shape(96, 6, 2, 16, 160),
    "one_each_half_split": Shape(64, 2, 2, 72, 90, interleaved=False),
    "granite": Shape(
        70,
        8,
        1,
        64,
        100,
        scales={"attention_scale": 0.05, "embedding_scale": 12.0, "residual_scale": 0.22, "logits_scale": 1 / 8},
    ),
}


def quantised(weight: Tensor, kind: str) -> Tensor:
    if kind.startswith("bf16"):
        return weight.bfloat16().double()
    q, scale = packing.quantize_groups(weight, 8 if kind == "int8" else 4)
    return q.double() * scale.double().repeat_interleave(32, 1)[:, : weight.shape[1]]


class Reference:
    """The model in fp64 on the weights that the kernels multiply, and the packed model beside it."""

    def __init__(self, shape: Shape, kind: str, seed: int = 0) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)

        def matrix(outputs: int, inputs: int) -> Tensor:
            return torch.randn(outputs, inputs, generator=generator) / inputs**0.5

        def norm() -> Tensor:
            return 1 + 0.2 * torch.randn(shape.width, generator=generator)

        attended, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        head_kind = "int8" if kind == "int4" else kind
        self.layers, packed = [], []
        for _ in range(shape.layers):
            raw = [
                matrix(attended + 2 * kv, shape.width),
                matrix(shape.width, attended),
                matrix(2 * shape.ff, shape.width),
                matrix(shape.width, shape.ff),
            ]
            norms = [norm(), norm()]
            bias = 0.1 * torch.randn(attended + 2 * kv, generator=generator)
            self.layers.append(
                ([quantised(weight, kind) for weight in raw], [n.double() for n in norms], bias.double())
            )
            qkv = kernels.PackedLinear(raw[0], bias, kind=kind)
            gate_up = kernels.PackedLinear(raw[2], kind=kind, activation="swiglu")
            out, down = (kernels.PackedLinear(weight, kind=kind) for weight in (raw[1], raw[3]))
            packed.append(kernels.PackedLayer(qkv, out, gate_up, down, *norms))
        self.final_norm, head = norm(), matrix(shape.vocabulary, shape.width)
        self.head = quantised(head, head_kind)
        frequencies = 100.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.cos, self.sin = kernels.rope_tables(frequencies, 700)
        self.packed = kernels.PackedText(
            packed,
            self.final_norm,
            kernels.PackedLinear(head, kind=head_kind),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            cos=self.cos,
            sin=self.sin,
            eps=1e-5,
            interleaved=shape.interleaved,
            **shape.scales,
        )

    def rotate(self, x_THD: Tensor) -> Tensor:
        length, half = x_THD.shape[0], self.shape.head_dim // 2
        cos, sin = (table[:length, None].double() for table in (self.cos, self.sin))
        if self.shape.interleaved:
            a, b = x_THD[..., 0::2], x_THD[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)
        a, b = x_THD[..., :half], x_THD[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def __call__(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Normed hidden states (T, D) and logits (T, V) of one sequence from its embeddings."""
        s, scales = self.shape, self.shape.scales
        x = hidden_TD.double() * scales.get("embedding_scale", 1.0)
        added = scales.get("residual_scale", 1.0)
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        for (qkv, out, gate_up, down), (norm1, norm2), bias in self.layers:
            rows = (rms(x, norm1) @ qkv.T + bias).unflatten(1, (-1, s.head_dim))
            q, k, v = rows.split([s.heads, s.kv_heads, s.kv_heads], 1)
            q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(s.heads // s.kv_heads, 1) for t in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) * scales.get("attention_scale", s.head_dim**-0.5)
            weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
            x = x + added * (torch.einsum("hts,shd->thd", weights, v).flatten(1) @ out.T)
            gate, up = (rms(x, norm2) @ gate_up.T).chunk(2, 1)
            x = x + added * ((torch.nn.functional.silu(gate) * up) @ down.T)
        normed = rms(x, self.final_norm.double())
        return normed, normed @ self.head.T * scales.get("logits_scale", 1.0)

    def embeddings(self, tokens: int, seed: int) -> Tensor:
        return torch.randn(tokens, self.shape.width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8", "int4"])
@pytest.mark.parametrize("name", [*SHAPES])
def test_chunked_prefill_and_decode_follow_the_fp64_model(isa: str, kind: str, name: str) -> None:
    reference = Reference(SHAPES[name], kind)
    model, hidden = reference.packed, reference.embeddings(90, 1)
    normed, logits = reference(hidden)
    cache = model.new_cache(64 * 4)
    start = 64
    with kernels.use_isa(isa):
        at = 0
        for count in (1, 6, 60, 3, 15):  # chunks that start at odd positions and cross a block
            got_normed, got_logits = model.prefill(hidden[at : at + count], at, start, cache)
            assert relative_error(got_normed, normed[at : at + count]) < 0.02
            at += count
            assert relative_error(got_logits, logits[at - 1]) < 0.02
        for position in range(at, 90):
            place = torch.tensor([position]), torch.tensor([start])
            got = model.decode(hidden[position : position + 1], *place, cache)
            assert relative_error(got[0], logits[position]) < 0.02


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8", "int4"])
def test_batches_of_1_to_33_at_their_own_positions_do_not_touch_each_other(isa: str, kind: str) -> None:
    reference = Reference(SHAPES["grouped"], kind)
    model, rows = reference.packed, 33
    lengths = [1 + 7 * i % 60 for i in range(rows)]
    hidden = [reference.embeddings(length + 1, i) for i, length in enumerate(lengths)]
    cache = model.new_cache(64 * rows)
    with kernels.use_isa(isa):
        for i, length in enumerate(lengths):
            model.prefill(hidden[i][:length], 0, 64 * i, cache, logits=False)
        last = torch.stack([row[-1] for row in hidden])
        positions, starts = torch.tensor(lengths), 64 * torch.arange(rows)
        together = model.decode(last, positions, starts, cache)
        for count in (1, 2, 3, 8, 13, 32):
            first = rows - count
            alone = model.decode(last[first:], positions[first:], starts[first:], cache)
            assert torch.equal(alone, together[first:])
    for i in (0, 5, 32):
        assert relative_error(together[i], reference(hidden[i])[1][-1]) < 0.02


@pytest.mark.parametrize("isa", runnable_isas())
def test_a_long_context_is_cut_into_parts_and_joined(isa: str) -> None:
    reference = Reference(SHAPES["one_each_half_split"], "bf16")
    model, hidden = reference.packed, reference.embeddings(601, 2)
    want = reference(hidden)[1]
    cache = model.new_cache(640)
    before = torch.get_num_threads()
    with kernels.use_isa(isa):
        model.prefill(hidden[:600], 0, 0, cache, logits=False)
        place = torch.tensor([600]), torch.tensor([0])
        got = model.decode(hidden[600:], *place, cache)
        try:
            torch.set_num_threads(5)
            assert torch.equal(model.decode(hidden[600:], *place, cache), got)
            _, logits = model.prefill(hidden[300:600], 300, 0, cache)
        finally:
            torch.set_num_threads(before)
    assert relative_error(got[0], want[600]) < 0.02
    assert relative_error(logits, want[599]) < 0.02


def test_stale_memory_is_never_read() -> None:
    reference = Reference(SHAPES["grouped"], "bf16")
    model, hidden = reference.packed, reference.embeddings(70, 3)
    answers = []
    for stale in (0, -1):  # -1: every bf16 a NaN
        cache = model.new_cache(128)
        cache.keys.fill_(stale), cache.values.fill_(stale)
        _, first = model.prefill(hidden[:63], 0, 0, cache)
        steps = [model.decode(hidden[p : p + 1], torch.tensor([p]), torch.tensor([0]), cache) for p in range(63, 70)]
        answers.append(torch.cat([first[None], *steps]))
    assert torch.equal(*answers)
    assert answers[0].isfinite().all()


def test_runs_can_be_copied_and_read_back() -> None:
    reference = Reference(SHAPES["one_each_half_split"], "bf16")
    model, hidden = reference.packed, reference.embeddings(100, 4)
    cache = model.new_cache(64 * 5)
    model.prefill(hidden[:99], 0, 0, cache, logits=False)
    cache.copy(0, 192, 99)
    for layer in range(2):
        for mine, copied in zip(cache.read(layer, 0, 99), cache.read(layer, 192, 99), strict=True):
            assert mine.shape == (99, 2, 72)
            assert torch.equal(mine, copied)
    steps = [model.decode(hidden[99:], torch.tensor([99]), torch.tensor([start]), cache) for start in (0, 192)]
    assert torch.equal(*steps)
    assert kernels.PackedCache.bytes_per_token(2, 2, 72) == 2 * 2 * 2 * (72 + 80)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (4, 4, 128), (5, 1, 48)])
def test_causal_attention_alone(isa: str, heads: int, kv_heads: int, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    qkv = torch.randn(133, (heads + 2 * kv_heads) * d, generator=generator).bfloat16()
    still = torch.ones(200, d // 2), torch.zeros(200, d // 2)  # no rotation: that is tested with the whole model
    cache = kernels.PackedCache(3, kv_heads, d, 256)
    with kernels.use_isa(isa):
        parts = [
            kernels.causal_attention(part, cache, *still, heads=heads, layer=1, start=0, position=position, scale=0.1)
            for position, part in [(0, qkv[:31]), (31, qkv[31:])]
        ]
    q, k, v = qkv.double().unflatten(1, (-1, d)).split([heads, kv_heads, kv_heads], 1)
    stored = cache.read(1, 0, 133)
    assert torch.equal(stored[0].double(), k)
    assert torch.equal(stored[1].double(), v)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * 0.1
    weights = scores.masked_fill(~torch.ones(133, 133, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    want = torch.einsum("hts,shd->thd", weights, v).flatten(1)
    assert (torch.cat(parts).double() - want).abs().max() < 0.02


@pytest.mark.parametrize("isa", runnable_isas())
def test_a_row_attends_alike_in_every_tile(isa: str) -> None:
    """Rows are computed a few together, each such tile beside the one before: neither may show in an answer.

    bf16 hides all but one in a million of what another order of summing changes, so there are many answers.
    """
    heads, d, rows = 4, 256, 700
    with kernels.use_isa(isa):
        for seed in range(1, 4):
            generator = torch.Generator().manual_seed(seed)
            qkv = torch.randn(rows, 3 * heads * d, generator=generator).bfloat16()
            turns = torch.rand(rows, d // 2, generator=generator) * 6
            answers = []
            for cuts in ([], [1, 64, 69, 192], list(range(5, rows, 5))):
                cache = kernels.PackedCache(1, heads, d, 704)
                parts = [
                    kernels.causal_attention(
                        qkv[begin:end], cache, turns.cos(), turns.sin(), heads=heads, layer=0, start=0, position=begin
                    )
                    for begin, end in zip([0, *cuts], [*cuts, rows], strict=True)
                ]
                answers.append(torch.cat(parts))
            assert answers[0].isfinite().all()
            assert torch.equal(answers[1], answers[0])
            assert torch.equal(answers[2], answers[0])


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("width", [16, 33, 576, 70])
def test_norms(isa: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = (3 + torch.randn(2, 7, 2 * width, generator=generator)).bfloat16()[..., :width]
    x[0, 0] = 0.0
    x[0, 1] = 1e-40
    weight, bias = torch.randn(2, width, generator=generator)
    wide = x.double()
    with kernels.use_isa(isa):
        got_rms = kernels.rms_norm(x, weight, 1e-5).double()
        got_layer = kernels.layer_norm(x, weight, bias, 1e-6).double()
    assert torch.allclose(got_rms, rms(wide, weight.double()), rtol=0.01, atol=1e-6)
    want = torch.nn.functional.layer_norm(wide, (width,), weight.double(), bias.double(), 1e-6)
    assert torch.allclose(got_layer, want, rtol=0.01, atol=0.005)


def test_extreme_values_stay_in_their_row() -> None:
    reference = Reference(SHAPES["grouped"], "int8")
    model, cache = reference.packed, reference.packed.new_cache(64 * 4)
    hidden = reference.embeddings(4, 5)
    clean = model.decode(hidden, torch.zeros(4, dtype=torch.int64), 64 * torch.arange(4), cache)
    hidden[1, 0], hidden[2, 1], hidden[3] = torch.nan, torch.inf, -0.0
    got = model.decode(hidden, torch.zeros(4, dtype=torch.int64), 64 * torch.arange(4), cache)
    assert torch.equal(got[0], clean[0])
    assert got[1].isnan().all()
    assert not got[2].isfinite().any()
    assert got[3].isfinite().all()


def test_wrong_inputs_are_named() -> None:
    reference = Reference(SHAPES["grouped"], "bf16")
    model, cache = reference.packed, reference.packed.new_cache(128)
    hidden, zero = reference.embeddings(1, 0), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match="multiple of 64"):
        model.decode(hidden, zero, zero + 32, cache)
    with pytest.raises(InputError, match="within its 128 positions"):
        model.prefill(hidden, 64, 64, cache)
    with pytest.raises(InputError, match="outside the 700"):
        model.decode(hidden, zero + 700, zero, cache)
    with pytest.raises(InputError, match=r"positions must be int64 \(1,\)"):
        model.decode(hidden, zero.int(), zero, cache)
    with pytest.raises(InputError, match="hidden must be bf16"):
        model.decode(hidden.float(), zero, zero, cache)
    with pytest.raises(InputError, match="another model"):
        model.decode(hidden, zero, zero, kernels.PackedCache(1, 2, 16, 64))
    with pytest.raises(ConfigurationError, match="even head_dim"):
        kernels.PackedCache(1, 1, 15, 64)
    layer = model.layers[0]
    with pytest.raises(ConfigurationError, match="qkv must be 96 -> 192"):
        kernels.PackedText(
            [layer], reference.final_norm, model.head, heads=4, kv_heads=4, head_dim=16, cos=model._floats[-2],
            sin=model._floats[-1], eps=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("kind", ["bf16", "bf16_compact", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_step_from_tokens_is_one_from_their_embeddings(isa: str, kind: str, rows: int) -> None:
    model = Reference(SHAPES["grouped"], kind).packed
    places = torch.tensor([i % 3 for i in range(rows)]), 64 * torch.arange(rows)
    positions, starts = (place.tolist() for place in places)
    ids = [(model.vocabulary - 1) * i // max(1, rows - 1) for i in range(rows)]
    caches = [model.new_cache(64 * rows) for _ in range(2)]
    for cache in caches:
        cache.keys.zero_(), cache.values.zero_()
    with kernels.use_isa(isa):
        want = model.decode(model.head.rows(torch.tensor(ids)), *places, caches[0])
        got, best = model.step(ids, positions, starts, caches[1])
        assert torch.equal(got, want) and best == want.argmax(1).tolist()
        banned = [*{best[0], 0}]
        got, best = model.step(ids, positions, starts, caches[1], banned)
    want[:, banned] = -torch.inf
    assert torch.equal(got, want) and best == want.argmax(1).tolist()
    table = torch.randn(model.vocabulary, model.width).bfloat16()
    model.c_model.embeddings = table.data_ptr()  # weights that are not tied
    want = model.decode(table[ids], *places, caches[0])
    assert torch.equal(model.step(ids, positions, starts, caches[1])[0], want)


def test_the_first_of_equal_logits_is_chosen_and_nothing_beyond_the_ends_is_read() -> None:
    reference = Reference(SHAPES["grouped"], "bf16")
    model, cache = reference.packed, reference.packed.new_cache(64)
    everything = [*range(model.vocabulary)]
    for left in ([7], [7, 90], []):  # all others are banned; in the end every logit is -infinity
        model.c_model.logits_scale = 0.0
        _, best = model.step([1], [0], [0], cache, [token for token in everything if token not in left])
        assert best == [left[0] if left else 0]
    for wrong in ({"ids": [model.vocabulary]}, {"ids": [-1]}, {"ids": []}, {"banned": [model.vocabulary]}):
        call: dict[str, Any] = {"ids": [1], "positions": [0], "starts": [0], "banned": [], **wrong}
        with pytest.raises((InputError, ValueError)):
            model.step(call["ids"], call["positions"], call["starts"], cache, call["banned"])
    with pytest.raises(InputError, match="a multiple of 64"):
        model.step([1], [0], [32], cache)
