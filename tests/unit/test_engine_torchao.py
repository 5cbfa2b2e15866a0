"""Quantised weights by torchao: run by `make test-torchao`, which brings it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from smolvlm_fms.engine import torchao_weights
from smolvlm_fms.errors import ConfigurationError, MissingDependencyError
from smolvlm_fms.fms_bridge.loading import load_model
from tests.tiny_models import build_checkpoint

HERE = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(
    not HERE and "SMOLVLM_REQUIRE_TORCHAO" not in os.environ,
    reason="torchao is not here; `make test-torchao` brings it",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("tiny"), "smolvlm", seed=3)


@needs_torchao
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_int8_blocks_are_near_the_whole_ones(folder: Path) -> None:
    ids = torch.arange(20, 60)[None]
    plain, small = (load_model(folder, dtype=torch.bfloat16) for _ in range(2))
    torchao_weights.quantize_text(small, "int8")
    with torch.inference_mode():
        expected, result = (model(ids).float() for model in (plain, small))
    error = float((result - expected).pow(2).mean().sqrt() / expected.std())
    assert 0 < error < 0.05
    first = small.text_model.base_model.layers[0]
    quantised = [p for p in first.parameters() if type(p) is not torch.nn.Parameter]
    assert quantised and all("Int8" in type(p.data).__name__ or "Int8" in type(p).__name__ for p in quantised)
    assert type(small.text_model.head.weight) is torch.nn.Parameter


@needs_torchao
def test_an_unknown_kind_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="int2"):
        torchao_weights.quantize_text(load_model(folder), "int2")


def test_without_torchao_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingDependencyError, match=r"smolvlm-fms\[gpu\]"):
        torchao_weights.quantize_text(model, "int8")
