"""A vision tower's blocks in one call, and prefill without the last layer's other rows, beside the separate kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smolvlm_fms.engine import kernels
from smolvlm_fms.errors import ConfigurationError, InputError
from tests.unit.test_kernels_linear import runnable_isas

pytestmark = pytest.mark.skipif(not kernels.built(), reason="the CPU kernels were not built here")

HEADS, D, WIDTH, FF, EPS = 3, 22, 62, 90, 1e-6


def make_blocks(kind: str = "bf16", activation: str = "gelu_tanh", depth: int = 3, heads: int = HEADS) -> tuple:  # type: ignore[type-arg]
    """Blocks at sizes that fill no panel, and their weights as torch has them."""
    generator = torch.Generator().manual_seed(depth)

    def rand(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    layers, plain = [], []
    for _ in range(depth):
        attended = heads * D
        sizes = {"qkv": (3 * attended, WIDTH), "out": (WIDTH, attended), "up": (FF, WIDTH), "down": (WIDTH, FF)}
        weights = {name: (rand(*size), rand(size[0])) for name, size in sizes.items()}
        norms = [(1 + rand(WIDTH), rand(WIDTH)) for _ in range(2)]
        packed = {
            name: kernels.PackedLinear(w, b, kind=kind, activation=activation if name == "up" else "none")
            for name, (w, b) in weights.items()
        }
        layers.append(kernels.TowerLayer(**packed, attention_norm=norms[0], mlp_norm=norms[1]))
        plain.append((weights, norms))
    return kernels.PackedBlocks(layers, heads=heads, head_dim=D, eps=EPS), plain


def reference(plain: list, hidden: Tensor, mask: Tensor | None, activation: str, heads: int = HEADS) -> Tensor:  # type: ignore[type-arg]
    x = hidden.double()
    for weights, norms in plain:
        wide = {name: (w.double(), b.double()) for name, (w, b) in weights.items()}
        (w1, b1), (w2, b2) = [(w.double(), b.double()) for w, b in norms]
        qkv = F.linear(F.layer_norm(x, (WIDTH,), w1, b1, EPS), *wide["qkv"]).view(-1, 3, heads, D)
        query, key, value = qkv.permute(1, 2, 0, 3)
        seen = None if mask is None else mask[None, None].expand(heads, len(x), -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(0, 1).flatten(1)
        x = x + F.linear(attended, *wide["out"])
        grown = F.linear(F.layer_norm(x, (WIDTH,), w2, b2, EPS), *wide["up"])
        grown = F.gelu(grown, approximate="tanh") if activation == "gelu_tanh" else grown * torch.sigmoid(1.702 * grown)
        x = x + F.linear(grown, *wide["down"])
    return x


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.02), ("int8_channel", 0.05)])
@pytest.mark.parametrize("tokens", [1, 7, 65, 131])
def test_close_to_fp64(isa: str, activation: str, kind: str, bound: float, tokens: int) -> None:
    tower, plain = make_blocks(kind, activation)
    hidden = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    mask = None if tokens < 7 else torch.arange(tokens) % 5 != 2
    with kernels.use_isa(isa):
        got = tower.run(hidden, mask).double()
    wanted = reference(plain, hidden, mask, activation)
    assert (got - wanted).norm() / wanted.norm() < bound


def test_a_tile_does_not_depend_on_threads_and_stops_at_taps() -> None:
    tower, _ = make_blocks(heads=2)
    hidden = torch.randn(50, WIDTH).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):  # five: more threads than heads
            torch.set_num_threads(threads)
            results.append(tower.run(hidden))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(tower.run(hidden, None, 1, 1), hidden), "no block, nothing changed"
    halves = tower.run(tower.run(hidden, None, 0, 2), None, 2, 3)  # rounded to bf16 in between
    assert torch.allclose(halves.float(), results[0].float(), atol=0.06)


def test_infinity_and_nan_reach_the_answer() -> None:
    tower, _ = make_blocks()
    for value in (float("inf"), float("nan")):
        hidden = torch.randn(20, WIDTH).bfloat16()
        hidden[3, 5] = value
        assert not tower.run(hidden)[3].isfinite().any()


def test_what_does_not_fit_is_said() -> None:
    tower, _ = make_blocks()
    with pytest.raises(InputError, match="patches, 62"):
        tower.run(torch.randn(4, 60).bfloat16())
    with pytest.raises(InputError, match="mask must be"):
        tower.run(torch.randn(4, WIDTH).bfloat16(), torch.ones(5, dtype=torch.bool))
    with pytest.raises(InputError, match="not among the 3"):
        tower.run(torch.randn(4, WIDTH).bfloat16(), None, 2, 4)
    with pytest.raises(ConfigurationError, match="a block's linears must be"):
        kernels.PackedBlocks(tower.layers, heads=HEADS + 1, head_dim=D, eps=EPS)
