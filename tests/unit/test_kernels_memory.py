"""Memory for packed weights: whole cache lines, no overlaps, given back with the last tensor."""

from __future__ import annotations

import gc
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from smolvlm_fms.engine.kernels import PackedLinear, memory

SHAPES = [(3, 100, 64), (1, 1, 4096), (5, 77, 64), (40, 4096, 64), (2, 96, 64)]


def test_tensors_are_separate_lines_of_the_right_shape() -> None:
    tensors = [memory.empty(shape, dtype) for shape in SHAPES for dtype in (torch.int32, torch.bfloat16)]
    for number, tensor in enumerate(tensors):
        assert tensor.is_contiguous() and tensor.data_ptr() % memory.LINE == 0
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number).all())
    assert [tuple(t.shape) for t in tensors[::2]] == SHAPES and tensors[1].dtype == torch.bfloat16


def test_large_pages_start_where_the_processor_wants_them() -> None:
    big = memory.empty((memory.CHUNK + 5,), torch.uint8)
    assert big.data_ptr() % memory.PAGE == 0
    big[-1] = 7
    assert big[-1] == 7


def test_threads_get_different_memory() -> None:
    with ThreadPoolExecutor(8) as pool:
        tensors = list(pool.map(lambda _: memory.empty((20_000,), torch.int32), range(64)))
    places = sorted(tensor.data_ptr() for tensor in tensors)
    assert all(after - before >= 80_000 for before, after in itertools.pairwise(places))


def test_memory_goes_with_the_last_tensor() -> None:
    first = memory.empty((memory.CHUNK,), torch.uint8)  # a chunk of its own, and the open one from now on
    assert memory._open is not None
    chunk = memory._open
    part = first[10:20]
    del first
    gc.collect()
    assert chunk() is not None
    part.fill_(1)
    del part
    gc.collect()
    assert chunk() is None
    assert memory.empty((100_000,), torch.uint8).fill_(3).sum() == 300_000


@pytest.mark.parametrize("broken", ["no such pages", "no address space"])
def test_torch_serves_where_the_system_does_not(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setattr(memory, "_open", None)
    if broken == "no such pages":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    else:

        class Full(memory._Chunk):
            def __new__(cls, *args: object, **more: object) -> Full:
                raise OSError("Cannot allocate memory")

        monkeypatch.setattr(memory, "_Chunk", Full)
    tensor = memory.empty((300, 300), torch.float32)
    assert tuple(tensor.shape) == (300, 300) and memory._open is None
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    assert torch.allclose(PackedLinear(weight)(x).float(), (x @ weight.T).float(), atol=0.2)
