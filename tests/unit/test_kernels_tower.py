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


@pytest.mark.parametrize("kind", ["bf16", "int8_channel"])
def test_a_tile_does_not_depend_on_threads_and_stops_at_taps(kind: str) -> None:
    tower, _ = make_blocks(kind, heads=2)
    hidden, many = torch.randn(50, WIDTH).bfloat16(), torch.randn(400, WIDTH).bfloat16()
    before = torch.get_num_threads()
    try:
        results, shared = [], []
        for threads in (1, 2, 5):  # five: more threads than heads
            torch.set_num_threads(threads)
            results.append(tower.run(hidden))
            shared.append(tower.run(many))  # rows enough for threads to take pieces from each other
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])
    assert torch.equal(tower.run(hidden, None, 1, 1), hidden), "no block, nothing changed"
    halves = tower.run(tower.run(hidden, None, 0, 2), None, 2, 3)  # rounded to bf16 in between
    bound = 0.06 if kind == "bf16" else 0.12
    assert torch.allclose(halves.float(), results[0].float(), atol=bound)


def attention_alone(kind: str, heads: int, d: int, sharpness: float) -> tuple[kernels.PackedBlocks, Tensor]:
    """A block that adds its heads' attention to the stream and nothing else, and the weight (3 HD, HD) of its queries,
    keys and values; keys and values have a bias of size two."""
    generator = torch.Generator().manual_seed(d)
    width = heads * d
    weight = (torch.randn(3 * width, width, generator=generator) / width**0.5).bfloat16()
    weight[:width] *= sharpness
    bias = 2 * torch.randn(3 * width, generator=generator).bfloat16()
    bias[:width] = 0
    nothing = kernels.PackedLinear(torch.zeros(64, width), kind=kind, activation="gelu_tanh")
    layer = kernels.TowerLayer(
        qkv=kernels.PackedLinear(weight, bias, kind=kind),
        out=kernels.PackedLinear(torch.eye(width), kind=kind),
        up=nothing,
        down=kernels.PackedLinear(torch.zeros(width, 64), kind=kind),
        attention_norm=(torch.ones(width), torch.zeros(width)),
        mlp_norm=(torch.ones(width), torch.zeros(width)),
    )
    return kernels.PackedBlocks([layer], heads=heads, head_dim=d, eps=EPS), torch.cat((weight, bias[:, None]), 1)


def attended(weight: Tensor, hidden: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """fp64, of what `attention_alone` computes: what is added to the stream."""
    x = F.layer_norm(hidden.double(), hidden.shape[1:], eps=EPS)
    qkv = F.linear(x, weight[:, :-1].double(), weight[:, -1].double()).unflatten(1, (3, heads, -1))
    query, key, value = qkv.permute(1, 2, 0, 3)
    seen = None if mask is None else mask[None, None].expand(heads, len(x), -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.006), ("int8_channel", 0.015)])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("d", "tokens"), [(64, 512), (64, 513), (72, 630), (16, 1030), (10, 3)])
def test_attention_of_many_tokens(isa: str, kind: str, bound: float, sharpness: float, d: int, tokens: int) -> None:
    """More keys than one block of the 8-bit kernel holds, from even weights to a few large ones."""
    tower, weight = attention_alone(kind, 2, d, sharpness)
    hidden = torch.randn(tokens, 2 * d, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    mask = torch.arange(tokens) % 7 != 3 if d == 72 else None
    wanted = attended(weight, hidden, mask, 2)
    if mask is not None:
        hidden[~mask] = torch.nan  # which nobody may see
    with kernels.use_isa(isa):
        got = tower.run(hidden, mask)
    seen = slice(None) if mask is None else mask
    assert (got - hidden.double() - wanted)[seen].norm() / wanted[seen].norm() < bound
    assert mask is None or not got[~mask].isfinite().any()


@pytest.mark.parametrize("isa", runnable_isas())
def test_a_key_that_all_look_at_hides_nobody(isa: str) -> None:
    """Half of the weight on one key, the rest spread over a thousand: each is below half a step of eight bits."""
    tower, weight = attention_alone("int8_channel", 1, 64, 0.0)
    weight[:64, -1] = 0
    weight[0, -1] = 2.0  # every query looks along the first channel, and one key lies far out there
    weight[64, :-1] = 0
    weight[64, 0], weight[64, -1] = 6.0, 0.0
    hidden = 0.05 * torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    hidden[:, 1:3] += torch.tensor([3.0, -3.0])  # so that the norm leaves the first channel small
    hidden[77, 0] = 3.0
    hidden = hidden.bfloat16()
    layer = tower.layers[0]
    qkv = kernels.PackedLinear(weight[:, :-1], weight[:, -1], kind="int8_channel")
    layer = kernels.TowerLayer(qkv, layer.out, layer.up, layer.down, layer.attention_norm, layer.mlp_norm)
    wanted = attended(weight, hidden, None, 1)
    with kernels.use_isa(isa):
        got = kernels.PackedBlocks([layer], heads=1, head_dim=64, eps=EPS).run(hidden)
    assert (got - hidden.double() - wanted).norm() / wanted.norm() < 0.015


@pytest.mark.parametrize("isa", runnable_isas())
def test_no_key_at_all_adds_nothing(isa: str) -> None:
    tower, _ = attention_alone("int8_channel", 2, 16, 1.0)
    hidden = torch.randn(9, 32).bfloat16()
    with kernels.use_isa(isa):
        assert torch.equal(tower.run(hidden, torch.zeros(9, dtype=torch.bool)), hidden)


@pytest.mark.parametrize("isa", runnable_isas())
def test_scores_of_ten_thousands_leave_one_key(isa: str) -> None:
    tower, weight = attention_alone("int8_channel", 1, 64, 2e4)
    hidden = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with kernels.use_isa(isa):
        got = tower.run(hidden).double() - hidden.double()
    x = F.layer_norm(hidden.double(), (64,), eps=EPS)
    values = F.linear(x, weight[128:, :-1].double(), weight[128:, -1].double())
    nearest = torch.cdist(got, values).min(1)
    assert (nearest.values / values.norm(dim=1)[nearest.indices]).median() < 0.02
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", ["bf16", "int8_channel"])
def test_infinity_and_nan_reach_the_answer(kind: str) -> None:
    tower, _ = make_blocks(kind)
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
