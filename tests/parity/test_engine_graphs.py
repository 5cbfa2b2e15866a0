"""The GPU path's decode step, as far as it runs without one: static shapes, padded rows, compiled; equal tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smolvlm_fms.engine.config import EngineConfig
from smolvlm_fms.engine.engine import Engine
from smolvlm_fms.engine.graph_runner import GraphRunner, bucket
from smolvlm_fms.fms_bridge.loading import load_model
from tests.parity.test_engine_parity import TILES, submit_row, tokens_of
from tests.tiny_models import build_checkpoint, load_peer, make_batch

FAMILIES = ["smolvlm", "granite", "llama3_rope"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: build_checkpoint(root / family, family, seed=3) for family in FAMILIES}


def engine_for(folder: Path, device: str = "cpu", **options: Any) -> Engine:
    model = load_model(folder, dtype=torch.float32, device=torch.device(device))
    return Engine(
        GraphRunner(model, kv_tokens=2048, **options),
        decode=lambda ids: "",
        stop_tokens=[],
        context_length=model.config.text.max_position_embeddings,
        config=EngineConfig.for_device("cuda"),
    )


def expected_tokens(folder: Path, batch: dict[str, torch.Tensor]) -> list[list[int]]:
    with torch.no_grad():
        out = load_peer(folder).generate(**batch, do_sample=False, max_new_tokens=24)
    rows: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return rows


@pytest.mark.parametrize(
    ("family", "compiled"), [*((family, False) for family in FAMILIES), ("smolvlm", True)], ids=lambda value: str(value)
)
def test_a_static_step_gives_the_tokens_of_transformers(family: str, compiled: bool, folders: dict[str, Path]) -> None:
    batch = make_batch(folders[family], TILES, seed=1)
    engine = engine_for(folders[family], compile_step=compiled, backend="aot_eager")
    for layer in engine.backend._cache:  # type: ignore[attr-defined]
        for tensor in layer:
            tensor.fill_(float("nan"))  # what fresh memory may hold
    together = [submit_row(engine, batch, row) for row in range(3)]  # three rows run as four
    expected = expected_tokens(folders[family], batch)
    assert [tokens_of(generation) for generation in together] == expected[:3]
    assert tokens_of(submit_row(engine, batch, 3)) == expected[3]


def test_shapes_are_few(folders: dict[str, Path]) -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 33)] == [1, 2, 4, 4, 8, 64]
    assert bucket(3, 256) == 256 and bucket(257, 256) == 512
    batch = make_batch(folders["smolvlm"], TILES, seed=1)
    engine = engine_for(folders["smolvlm"])
    for generation in [submit_row(engine, batch, row) for row in range(4)]:
        tokens_of(generation)
    assert isinstance(engine.backend, GraphRunner)
    assert set(engine.backend._steps) <= {(batch, 256) for batch in (1, 2, 4)}


def test_padded_rows_touch_nobodys_cache(folders: dict[str, Path]) -> None:
    """Rows that fill a batch up may write to the spare block only."""
    engine = engine_for(folders["smolvlm"])
    backend = engine.backend
    assert isinstance(backend, GraphRunner)
    for layer in backend._cache:
        for tensor in layer:
            tensor.fill_(7.0)
    with torch.inference_mode():
        backend._compute(backend._idle(4), 256)
    for layer in backend._cache:
        for tensor in layer:
            assert bool((tensor[: backend.kv_tokens] == 7.0).all()) and not bool((tensor == 7.0).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU; none is here")
def test_graphs_give_the_same_tokens_on_a_gpu(folders: dict[str, Path]) -> None:
    batch = make_batch(folders["smolvlm"], TILES, seed=1)
    engine = engine_for(folders["smolvlm"], device="cuda")
    together = [submit_row(engine, batch, row) for row in range(4)]
    assert [tokens_of(generation) for generation in together] == expected_tokens(folders["smolvlm"], batch)
