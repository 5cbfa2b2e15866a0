"""FMS's own ways in: get_model with every source, hf_pretrained, vision_only, tensor parallelism, quantised linears."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fms.models import get_model, list_variants
from fms.modules import linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smolvlm_fms
from smolvlm_fms.config import SmolVLMConfig
from smolvlm_fms.config_presets import PRESETS
from smolvlm_fms.errors import CheckpointError, ConfigurationError, UnsafeCheckpointError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from tests.tiny_models import build_checkpoint, make_batch

assert smolvlm_fms
VARIANT = "256m_instruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with torch.no_grad():
        yield build_checkpoint(tmp_path_factory.mktemp("plain"), "smolvlm")


def shape_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """The folder's configuration as get_model's keyword arguments, over those of the variant."""
    config = SmolVLMConfig.from_hf(folder)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | changes


def logits(model: Any, folder: Path) -> Tensor:
    result: Tensor = model(**make_batch(folder, [1, 2]))
    return result


def run_python(code: str, *arguments: str) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


# ── registration ──


def test_every_preset_is_a_variant() -> None:
    assert set(list_variants("smolvlm")) == set(PRESETS)


@pytest.mark.parametrize("variant", PRESETS)
def test_every_variant_is_built_from_its_preset(variant: str) -> None:
    model = get_model("smolvlm", variant, device_type="meta")
    assert model.get_config() == PRESETS[variant]
    assert all(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("order", ["import smolvlm_fms, fms.models", "import fms.models, smolvlm_fms"])
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    out = run_python(f"{order}; from fms.models import list_models; print('smolvlm' in list_models())")
    assert out.split() == ["True"]


def test_importing_our_model_first_registers_as_well() -> None:
    """Our modules import FMS's, so FMS is imported, and we registered, in the middle of their own import."""
    out = run_python("import smolvlm_fms.model.smolvlm; from fms.models import list_models; print(list_models())")
    assert "'smolvlm'" in out


def test_importing_the_package_imports_neither() -> None:
    out = run_python(
        "import smolvlm_fms, sys; print([m for m in ('torch', 'fms', 'transformers') if m in sys.modules])"
    )
    assert out.split() == ["[]"]


# ── get_model ──


def test_get_model_equals_load_model(folder: Path) -> None:
    model = get_model("smolvlm", VARIANT, model_path=str(folder), source="hf", **shape_of(folder))
    assert torch.equal(logits(model, folder), logits(load_model(folder), folder))


def test_hf_pretrained_reads_the_configuration_itself(folder: Path) -> None:
    model = get_model("hf_pretrained", model_path=str(folder))
    assert torch.equal(logits(model, folder), logits(load_model(folder), folder))


@pytest.mark.parametrize("source", [None, "fms"])
def test_fms_own_format(folder: Path, tmp_path: Path, source: str | None) -> None:
    save_pretrained(load_model(folder), tmp_path, source="fms")
    for fused in (True, False):
        arguments = shape_of(folder, fused_weights=fused)
        model = get_model("smolvlm", VARIANT, model_path=str(tmp_path), source=source, **arguments)
        torch.testing.assert_close(logits(model, folder), logits(load_model(folder), folder))


def test_tied_heads(tmp_path: Path) -> None:
    tied = build_checkpoint(tmp_path, "tied")
    model = get_model("smolvlm", VARIANT, model_path=str(tied), source="hf", **shape_of(tied))
    assert model.text_model.head.weight is model.text_model.base_model.embedding.weight
    assert torch.equal(logits(model, tied), logits(load_model(tied), tied))


def test_an_unknown_source_raises(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="Unknown source 'hugging' for smolvlm; known: fms, hf"):
        get_model("smolvlm", VARIANT, model_path=str(folder), source="hugging", **shape_of(folder))


def test_the_wrong_source_raises(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is the source"):
        get_model("smolvlm", VARIANT, model_path=str(folder), **shape_of(folder))


def test_missing_and_unexpected_tensors_raise(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    lost = state.pop("model.text_model.layers.1.mlp.down_proj.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: model\.text_model\.layers\.1\.mlp\.down_proj"):
        get_model("smolvlm", VARIANT, model_path=str(tmp_path), source="hf", **shape_of(folder))
    state |= {"model.text_model.layers.1.mlp.down_proj.weight": lost, "model.perceiver.latents": lost.clone()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.perceiver\.latents"):
        get_model("smolvlm", VARIANT, model_path=str(tmp_path), source="hf", **shape_of(folder))


@pytest.mark.parametrize("shape", [(1,), (37,)], ids=["one that copy_ would spread", "another width"])
def test_misshapen_tensors_raise(folder: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.text_model.norm.weight"] = torch.ones(shape)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.text_model\.norm\.weight is .*, not \(36,\)"):
        get_model("smolvlm", VARIANT, model_path=str(tmp_path), source="hf", **shape_of(folder))


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("named", [False, True], ids=["the folder", "the file"])
def test_pickles_are_refused_unopened(folder: Path, tmp_path: Path, named: bool) -> None:
    weights = tmp_path / "model" / "pytorch_model.bin"
    weights.parent.mkdir()
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, weights)
    (weights.parent / "config.json").write_bytes((folder / "config.json").read_bytes())
    where = weights if named else weights.parent
    with pytest.raises(UnsafeCheckpointError, match="pickles"):
        get_model("smolvlm", VARIANT, model_path=str(where), source="hf", **shape_of(folder))
    with pytest.raises(UnsafeCheckpointError, match="pickles"):
        get_model("hf_pretrained", model_path=str(weights.parent))
    assert not (tmp_path / "ran").exists()


def test_pickles_without_a_configuration_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "weights.bin")
    with pytest.raises(UnsafeCheckpointError, match="pickles"):
        get_model("smolvlm", VARIANT, model_path=str(tmp_path), source="hf", **shape_of(folder))


def test_other_architectures_keep_fmss_reader(tmp_path: Path) -> None:
    """A Llama of FMS's own from a pickle of tensors, as ever."""
    model = get_model("llama", "micro", device_type="cpu")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = get_model("llama", "micro", model_path=str(tmp_path), device_type="cpu")
    assert all(torch.equal(mine, other) for mine, other in zip(again.parameters(), model.parameters(), strict=True))


def test_unknown_fields_raise(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="emb_dim"):
        get_model("smolvlm", VARIANT, emb_dim=3)


@pytest.mark.parametrize("source", ["hf", "fms"])
def test_vision_only(folder: Path, tmp_path: Path, source: str) -> None:
    whole = load_model(folder)
    save_pretrained(whole, tmp_path, source=source)
    part = get_model("smolvlm", VARIANT, model_path=str(tmp_path), source=source, vision_only=True, **shape_of(folder))
    assert not hasattr(part.text_model, "head")
    pixels = make_batch(folder, [2])["pixel_values"]
    assert torch.equal(part.encode_images(pixels).features, whole.encode_images(pixels).features)


def test_without_a_checkpoint_the_weights_are_random_and_finite(folder: Path) -> None:
    torch.manual_seed(0)
    model = get_model("smolvlm", VARIANT, **shape_of(folder))
    assert all(weight.isfinite().all() for weight in model.parameters())
    out = logits(model, folder)
    assert out.isfinite().all() and out.std() > 0.1
    half = get_model("smolvlm", VARIANT, data_type="bfloat16", **shape_of(folder))
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


# ── quantised linears ──


class Int8Linear(nn.Module):
    """Rows in int8 with a scale each: what an out-of-tree ``linear_type`` looks like."""

    def __init__(self, in_features: int, out_features: int, bias: bool, _config: Any = None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None]
        return nn.functional.linear(x, weight, self.bias)


if "smolvlm_test_int8" not in linear.get_all_linear_type_to_sharding_maps():
    linear.register_linear_type_to_module_map("smolvlm_test_int8", Int8Linear)
    linear.register_linear_type_to_sharding_map("smolvlm_test_int8", lambda *_: None)


def _every_other(name: str | None) -> str:
    return "smolvlm_test_int8" if name is not None and "layers.1." in name else "torch_linear"


@pytest.mark.parametrize("kind", ["smolvlm_test_int8", _every_other], ids=["all", "by name"])
@pytest.mark.parametrize("fused", [True, False])
def test_quantised_linears(folder: Path, tmp_path: Path, kind: Any, fused: bool) -> None:
    """A Hugging Face-style checkpoint with int8 rows and scales: renamed, reordered and fused like any other."""
    state, exact = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        linear_weight = tensor.dim() == 2 and ".layers." in name
        if linear_weight and (kind == "smolvlm_test_int8" or "layers.1." in name):
            scale = tensor.abs().amax(1) / 127
            state[name] = (tensor / scale[:, None]).round().to(torch.int8)
            state[name.replace("weight", "scale")] = scale
            exact[name] = state[name] * scale[:, None]
        else:
            state[name] = exact[name] = tensor
    for path, tensors in ((tmp_path, state), (tmp_path / "exact", exact)):
        path.mkdir(exist_ok=True)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    arguments = {"linear_config": {"linear_type": kind}, "fused_weights": fused}
    expected = logits(load_model(tmp_path / "exact"), folder)
    ours = load_model(tmp_path, **arguments)
    torch.testing.assert_close(logits(ours, folder), expected)
    theirs = get_model("smolvlm", VARIANT, model_path=str(tmp_path), source="hf", **shape_of(folder, **arguments))
    torch.testing.assert_close(logits(theirs, folder), expected)


# ── tensor parallelism ──

PARALLEL = """
import dataclasses, sys, torch
import torch.distributed as dist
import smolvlm_fms
from fms.models import get_model
from smolvlm_fms.config import SmolVLMConfig
from tests.tiny_models import make_batch
folder, out = sys.argv[1:]
dist.init_process_group("gloo")
config = SmolVLMConfig.from_hf(folder)
arguments = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
with torch.no_grad():
    arguments |= {"model_path": folder, "source": "hf", "distributed_strategy": "tp"}
    model = get_model("smolvlm", "256m_instruct", **arguments)
    batch = make_batch(folder, [2, 0, 1])
    logits = model(**batch)
    _, cache = model(**batch, use_cache=True)
    heads = {layer.attn.kvheads for layer in model.text_model.base_model.layers}
torch.save((logits, heads, cache[0][0].shape[1]), f"{out}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_two_processes_give_one_process_logits(tmp_path: Path) -> None:
    """FMS's tensor parallelism over gloo: each process holds half of the heads; both see the whole result."""
    text = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
    folder = build_checkpoint(tmp_path / "model", "smolvlm", text=text)
    with torch.no_grad():
        expected = load_model(folder)(**make_batch(folder, [2, 0, 1]))
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
    for rank in range(2):
        found, heads, cached = torch.load(tmp_path / f"{rank}.pt")
        assert heads == {1} and cached == 1
        real = make_batch(folder, [2, 0, 1])["attention_mask"].bool()
        assert float((found - expected)[real].abs().max()) <= 1e-4
