"""FMS's own ways in, for LLaVA-Next: quantised linears, the vision part alone, tensor parallelism by two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fms.models import get_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolvlm_fms.config_llava import LlavaNextConfig
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from tests.tiny_llava import build_llava, make_llava_batch
from tests.unit.test_loading_fms import Int8Linear

ARCHITECTURE, VARIANT = "smolvlm_llava_next", "granite_vision_3_2_2b"
ROWS = [[0, 1], [], [2]]


@pytest.fixture(scope="module", params=["granite", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with torch.no_grad():
        yield build_llava(tmp_path_factory.mktemp(f"fms-{request.param}"), request.param)


def shape_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """The folder's configuration as get_model's keyword arguments, over those of the variant."""
    config = LlavaNextConfig.from_hf(folder)
    return {field.name: getattr(config, field.name) for field in fields(config)} | changes


def logits(model: Any, folder: Path) -> Tensor:
    result: Tensor = model(**make_llava_batch(folder, ROWS))
    return result


@pytest.mark.parametrize("fused", [True, False])
def test_quantised_linears(folder: Path, tmp_path: Path, fused: bool) -> None:
    """A Hugging Face-style checkpoint with int8 rows and scales in the blocks of tower and text."""
    assert Int8Linear.__name__  # registers "smolvlm_test_int8" with FMS
    state, exact = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() == 2 and ".layers." in name:
            scale = tensor.abs().amax(1) / 127
            state[name] = (tensor / scale[:, None]).round().to(torch.int8)
            state[name.removesuffix("weight") + "scale"] = scale
            exact[name] = state[name] * scale[:, None]
        else:
            state[name] = exact[name] = tensor
    assert {tensor.dtype for tensor in state.values()} == {torch.int8, torch.float32}
    for path, tensors in ((tmp_path, state), (tmp_path / "exact", exact)):
        path.mkdir(exist_ok=True)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    arguments: dict[str, Any] = {"linear_config": {"linear_type": "smolvlm_test_int8"}, "fused_weights": fused}
    expected = logits(load_model(tmp_path / "exact"), folder)
    torch.testing.assert_close(logits(load_model(tmp_path, **arguments), folder), expected)
    shape = shape_of(folder, **arguments)
    theirs = get_model(ARCHITECTURE, VARIANT, model_path=str(tmp_path), source="hf", **shape)
    torch.testing.assert_close(logits(theirs.eval(), folder), expected)


@pytest.mark.parametrize("source", ["hf", "fms"])
def test_vision_only(folder: Path, tmp_path: Path, source: str) -> None:
    whole = load_model(folder)
    save_pretrained(whole, tmp_path, source=source)
    arguments = shape_of(folder, vision_only=True)
    part = get_model(ARCHITECTURE, VARIANT, model_path=str(tmp_path), source=source, **arguments)
    assert not hasattr(part.text_model, "head")
    batch = make_llava_batch(folder, ROWS)
    found, expected = (m.encode_images(batch["pixel_values"], batch["image_sizes"]).features for m in (part, whole))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


PARALLEL = """
import sys, torch
import torch.distributed as dist
import smolvlm_fms
from fms.models import get_model
from tests.tiny_llava import make_llava_batch
from tests.unit.test_fms_llava import ARCHITECTURE, ROWS, VARIANT, shape_of
from pathlib import Path
folder, out = sys.argv[1:]
dist.init_process_group("gloo")
with torch.no_grad():
    arguments = shape_of(Path(folder), model_path=folder, source="hf", distributed_strategy="tp")
    model = get_model(ARCHITECTURE, VARIANT, **arguments).eval()
    batch = make_llava_batch(folder, ROWS)
    logits = model(**batch)
    _, cache = model(**batch, use_cache=True)
    heads = {layer.attn.kvheads for layer in model.text_model.base_model.layers}
torch.save((logits, heads, cache[0][0].shape[1]), f"{out}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_two_processes_give_one_process_logits(tmp_path: Path) -> None:
    """FMS's tensor parallelism over gloo: each process holds one of two key heads; both see the whole result."""
    folder = build_llava(tmp_path / "model", "granite")
    with torch.no_grad():
        expected = logits(load_model(folder), folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PARALLEL, str(folder), str(tmp_path)], stderr=subprocess.PIPE, text=True, cwd=root,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    real = make_llava_batch(folder, ROWS)["attention_mask"].bool()
    for rank in range(2):
        found, heads, cached = torch.load(tmp_path / f"{rank}.pt")
        assert heads == {1} and cached == 1
        assert float((found - expected)[real].abs().max()) <= 1e-4
