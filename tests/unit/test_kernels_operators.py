"""The kernels as torch operators: schemas that tell the truth, fakes of the right shapes, and models made of them that
torch.compile and torch.export take whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import smolvlm_fms as sv
from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.cpu_runner import CpuRunner
from smolvlm_fms.engine.tower import PackedTower

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernels were not built here")


@pytest.fixture(scope="module")
def vlm() -> sv.VLM:
    return sv.load("demo", dtype="bfloat16", engine=sv.EngineConfig(kv_bytes=2**22))


@contextmanager
def compiled() -> Iterator[None]:
    """Dynamo warns of what it cannot look into, such as ctypes; whether the graph is whole is tested here."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def calls(vlm: sv.VLM) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every operator, of odd sizes."""
    runner = vlm.engine.backend
    assert isinstance(runner, CpuRunner)
    text, cache = runner.text, runner.text.new_cache(192)
    linear = kernels.PackedLinear(torch.randn(22, 20), torch.randn(22), activation="swiglu")
    int4 = kernels.PackedLinear(torch.randn(7, 33), kind="int4")
    compact = kernels.PackedLinear(torch.randn(7, 33), kind="bf16_compact")
    tower = runner.tower._native
    heads, keys, width = text.heads, text.kv_heads, text.head_dim
    qkv = bf16(5, (heads + 2 * keys) * width)
    cos, sin = kernels.rope_tables(torch.rand(width // 2), 64)
    return {
        "packed_linear": [
            (bf16(3, 20), linear.packed, None, linear.bias, bf16(3, 11), 0, 22, 20, linear._activation, 0.5, False),
            (bf16(2, 3, 33), int4.packed, int4.scales, None, None, int4._kind, 7, 64, 0, 1.0, True),
            (bf16(9, 33), compact.packed, compact.scales, None, None, compact._kind, 7, 34, 0, 1.0, False),
        ],
        "packed_rows": [
            (torch.tensor([[6, 0]]), compact.packed, compact.scales, compact._kind, 7, 34),
            (torch.tensor([6]), int4.packed, int4.scales, int4._kind, 7, 64),
        ],
        "vision_attention": [
            (bf16(2, 5, 3, 2, 6), None, 0.3),
            (bf16(1, 5, 3, 2, 6), torch.tensor([[True, False, True, True, False]]), 0.3),
        ],
        "norm": [(bf16(3, 7), torch.randn(7), None, 1e-5, False), (bf16(2, 3, 7), torch.randn(7), bf16(7), 1e-5, True)],
        "causal_attention": [(qkv, cache.keys, cache.values, cos, sin, heads, 0, 64, 3, 0.2, True)],
        "text_prefill": [
            (bf16(9, text.width), 3, 64, cache.keys, cache.values, text.handle, size, states)
            for size, states in ((text.vocabulary, True), (0, True), (text.vocabulary, False))
        ],
        "text_decode": [
            (bf16(2, text.width), torch.tensor([12, 0]), torch.tensor([64, 0]), cache.keys, cache.values, text.handle,
             text.vocabulary)
        ],
        "tower_blocks": [(bf16(6, tower.width), None, tower.handle, 0, 2), (bf16(6, tower.width),
                         torch.tensor([True] * 5 + [False]), tower.handle, 1, 1)],
    }  # fmt: skip


def test_every_operator_keeps_what_its_schema_and_its_fake_promise(vlm: sv.VLM) -> None:
    """Only what is marked is written to, no answer is an alias, and shapes and dtypes are known without computing."""
    given = calls(vlm)
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "smolvlm_fms::" in name}
    assert defined == given.keys(), "an operator without a test, or a test without an operator"
    for name, several in given.items():
        for arguments in several:
            operator = getattr(torch.ops.smolvlm_fms, name).default
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


class Tower(torch.nn.Module):
    def __init__(self, tower: PackedTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tiles_NCHW: Tensor) -> Tensor:
        return self.tower(tiles_NCHW)


def test_a_packed_tower_is_one_graph(vlm: sv.VLM) -> None:
    runner = vlm.engine.backend
    assert isinstance(runner, CpuRunner)
    side = vlm.model.config.vision.image_size
    tower, tiles = Tower(runner.tower), torch.rand(2, 3, side, side) * 2 - 1
    with torch.no_grad(), compiled():
        expected = tower(tiles)
        assert torch.equal(torch.compile(tower, backend="aot_eager", fullgraph=True)(tiles), expected)
        exported = torch.export.export(tower, (tiles,))
        assert torch.equal(exported.module()(tiles), expected)
    assert sum("tower_blocks" in str(node.target) for node in exported.graph.nodes) == 2


@pytest.mark.parametrize("way", [
    lambda model, ids: torch.compile(model, backend="aot_eager", fullgraph=True),
    lambda model, ids: torch.export.export(model, (ids,)).module(),
], ids=["compile", "export"])  # fmt: skip
def test_a_packed_text_model_is_one_graph(vlm: sv.VLM, way: Callable[..., Any]) -> None:
    ids = torch.tensor([[105, 106, 107, 108, 109, 110]])
    with torch.no_grad(), compiled():
        assert torch.equal(way(vlm.model, ids)(ids), vlm.model(ids))


def test_a_packed_model_with_a_picture_computes_the_same_compiled(vlm: sv.VLM) -> None:
    """Counting placeholders breaks the graph; the pieces are the same operators."""
    side = vlm.model.config.vision.image_size
    placeholders = [vlm.model.config.image_token_id] * vlm.model.config.tokens_per_tile
    inputs = {"input_ids": torch.tensor([[105, *placeholders, 106, 107]]), "pixel_values": bf16(1, 1, 3, side, side)}
    with torch.no_grad(), compiled():
        expected = vlm.model(**inputs)
        assert torch.equal(torch.compile(vlm.model, backend="aot_eager")(**inputs), expected)
        shorter = torch.tensor([[105, 106, 107]])
        again = torch.compile(vlm.model, backend="aot_eager")
        assert torch.equal(again(input_ids=shorter), vlm.model(shorter))
        longer = torch.tensor([[105, 106, 107, 108]])  # other lengths make the compiler take lengths for variables
        assert torch.equal(again(input_ids=longer), vlm.model(longer))


def test_rows_beyond_the_table_are_refused() -> None:
    linear = kernels.PackedLinear(torch.randn(150, 64), kind="bf16_compact")
    for wrong in (150, -1):
        with pytest.raises(IndexError, match=r"0\.\.\.149"):
            linear.rows(torch.tensor([3, wrong]))
