"""``convert --quantize``: a folder that the engine loads as it is, answering as if it had been quantised at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import smolvlm_fms as sv
from smolvlm_fms.engine import cpu_runner, kernels
from smolvlm_fms.engine.kernels.packing import quantize_groups
from smolvlm_fms.errors import CheckpointError, ConfigurationError
from smolvlm_fms.export import convert
from smolvlm_fms.fms_bridge.grouped import grouped_tensors, load_grouped
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.model.grouped import GroupedWeight
from tests.tiny_models import build_checkpoint, make_batch

KINDS = ("int8", "int4")
# Sizes that are no multiples of 32, an odd one among them, and what real ones look like.
ODD = {"hidden_size": 36, "intermediate_size": 51}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module", params=["smolvlm", "tied", "granite"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = WIDE if request.param == "smolvlm" else ODD
    with torch.no_grad():
        return build_checkpoint(tmp_path_factory.mktemp(request.param), request.param, processor=True, text=text)


def answers(model: sv.VLM) -> list[tuple[str, tuple[int, ...]]]:
    picture = Image.new("RGB", (40, 30), "red")
    questions: list[tuple[Any, str]] = [(None, "What is the capital of France?"), (picture, "What is this?")]
    found = [model.ask(images, question, max_tokens=12) for images, question in questions]
    return [(answer.text, answer.tokens) for answer in found]


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_if_quantised_at_load(folder: Path, kind: str, tmp_path: Path) -> None:
    result = convert(folder, tmp_path / "out", "hf", quantize=kind)
    assert result.ok, result.checks
    exact = [check for check in result.checks if check.name.startswith("quantised at load")]
    assert len(exact) == 4 and all(check.max_abs in (None, 0.0) for check in exact)
    assert answers(sv.load(tmp_path / "out")) == answers(sv.load(folder, quantize=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_without_kernels_too(folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(folder, tmp_path / "out", "hf", quantize=kind)
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert answers(sv.load(tmp_path / "out")) == answers(sv.load(folder, quantize=kind))


def test_bytes_on_the_disk(tmp_path: Path) -> None:
    """int8 and int4 files of the bundled model's text against bf16: 8.5 and 4.5 bits a weight, a 16-bit head apart."""
    sizes = {}
    for kind in (None, *KINDS):
        out = tmp_path / str(kind)
        assert convert("demo", out, "hf", quantize=kind).ok
        (file,) = out.glob("*.safetensors")
        tensors = load_file(file)
        blocks = [t for name, t in tensors.items() if ".text_model.layers." in name and "norm" not in name]
        sizes[kind] = sum(t.numel() * t.element_size() for t in blocks)
    assert sizes["int8"] == pytest.approx(sizes[None] * 8.5 / 16)
    assert sizes["int4"] == pytest.approx(sizes[None] * 4.5 / 16)


@pytest.mark.parametrize("kind", KINDS)
def test_elsewhere_it_becomes_plain_weights_of_the_same_values(folder: Path, kind: str, tmp_path: Path) -> None:
    """In fp32 the packed model differs from plain weights of the quantised values by bf16 rounding alone."""
    convert(folder, tmp_path / "out", "hf", quantize=kind)
    exact = sv.load(tmp_path / "out", dtype="float32")
    assert next(exact.model.parameters()).dtype == torch.float32
    packed = sv.load(tmp_path / "out")
    batch = make_batch(folder, tiles=[1])
    with torch.no_grad():
        plain = exact.model(**batch)
        quick = packed.model(**{n: t.bfloat16() if t.is_floating_point() else t for n, t in batch.items()}).float()
        unquantised = load_model(folder)(**batch)
    assert (plain - quick).std() < 0.03 * plain.std()
    assert 0 < (plain - unquantised).std() < (0.05 if kind == "int8" else 0.5) * plain.std()


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 64, 95])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_comes_back_from_its_two_tensors(bits: int, inputs: int) -> None:
    from smolvlm_fms.fms_bridge.grouped import _unpacked

    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(inputs))
    values, scales = quantize_groups(weight, bits)
    stored = grouped_tensors("a.weight", GroupedWeight(values, scales, bits))
    assert stored.keys() == {"a.weight_q", "a.weight_scale"}
    assert torch.equal(_unpacked(stored["a.weight_q"], inputs, bits), values)
    step = weight.abs().amax(1, keepdim=True) / (127 if bits == 8 else 5)
    assert ((GroupedWeight(values, scales, bits).wide() - weight).abs() <= step).all()


def test_others_are_told_what_it_is(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    out = tmp_path / "out"
    convert(folder, out, "hf", quantize="int8")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(out)
    with pytest.raises(CheckpointError, match=r"smolvlm_fms\.load reads them"):
        load_model(out)
    with pytest.raises(CheckpointError, match=r"smolvlm_fms\.load reads them"):
        convert(out, tmp_path / "again", "hf")
    with pytest.raises(ConfigurationError, match="int8 weights; they cannot become int4"):
        sv.load(out, quantize="int4")


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(folder, out, "hf", quantize="int4")
    file = out / "smolvlm_fms-int4.safetensors"
    tensors = load_file(file)
    name = "model.text_model.layers.1.mlp.up_proj.weight_q"
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(CheckpointError, match=r"w1\.weight is missing"):
        load_grouped(out)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"w1\.weight is .*not"):
        load_grouped(out)
    save_file(tensors | {"model.text_model.layers.1.mlp.up_proj.weight_zero": tensors[name].clone()}, file)
    with pytest.raises(CheckpointError, match="unexpected"):
        load_grouped(out)
    save_file(tensors, file)
    values = json.loads((out / "config.json").read_text())
    values["quantization_config"]["group_size"] = 64
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="does not know"):
        sv.load(out)


def test_a_model_that_the_engine_would_not_quantise_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="bfloat16"):
        convert(folder, tmp_path / "out", "hf", quantize="int8", dtype="float32")
    assert not cpu_runner.suits(load_model(folder, dtype=torch.float32))
