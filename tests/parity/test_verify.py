"""``smolvlm verify``: clean on every family, and not on a checkpoint that is computed a little wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from smolvlm_fms.cli import app
from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.modules.rotary import Rotary
from tests.verify_families import FAMILIES, idefics3, smolvlm2

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="verify needs transformers 5")


def run(folder: Path, **options: Any) -> dict[str, Any]:
    from smolvlm_fms.hf import verify

    report: dict[str, Any] = verify(folder, new_tokens=6, **options)
    return report


def failed(report: dict[str, Any]) -> list[str]:
    return [check["name"] for check in report["checks"] if not check["ok"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_clean(tmp_path: Path, family: str, dtype: str) -> None:
    report = run(FAMILIES[family](tmp_path), dtype=dtype)
    assert report["ok"], [check for check in report["checks"] if not check["ok"]]
    stages = {check["name"].partition(": ")[2] for check in report["checks"]}
    assert stages == {"ids", "pixels", "features", "logits", "greedy text"}
    for check in report["checks"]:
        assert {"name", "max_abs", "agree", "ok", "bound", "reference_noise"} == set(check)
        if dtype == "float32":
            assert check["bound"] <= 1e-4 or "pixels" in check["name"], "a tiny model's noise is below the tolerance"
    has_video = any(check["name"] == "video: logits" for check in report["checks"])
    assert has_video == ("video" in family)


def one_weight(model: Any) -> None:
    """One of a matrix's numbers by five percent of the matrix's spread."""
    weight = model.text_model.base_model.layers[1].attn.dense.weight
    weight[3, 4] += 0.05 * weight.std()


def one_matrix(model: Any) -> None:
    model.text_model.base_model.layers[2].ff_sub_layer.w2.weight.mul_(1.001)


def one_epsilon(model: Any) -> None:
    model.text_model.base_model.layers[1].ln.eps = 1e-4


def rope_base(model: Any) -> None:
    base, text = model.text_model.base_model, model.config.text
    changed = Rotary(dim=text.head_dim, ratio=1.001 * text.rope_theta, max_seq_len=text.max_position_embeddings)
    base.rot_emb.rope_scaling = changed.rope_scaling
    base.prepare_rope()


def tower_epsilon(model: Any) -> None:
    model.vision_tower.layers[0].ln1.eps = 1e-3


def interleaved_channels(model: Any) -> None:
    """Queries' channels permuted, keys' not: what a wrong RoPE layout does."""
    weight = model.text_model.base_model.layers[0].attn.in_proj.qkv_fused.weight
    weight[[0, 1]] = weight[[1, 0]]


WRONG: list[Callable[[Any], None]] = [one_weight, one_matrix, one_epsilon, rope_base, interleaved_channels]


def perturb(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Let verify compare a model that is wrong by ``change``."""

    def load(*args: Any, **options: Any) -> Any:
        model = load_model(*args, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            change(model)
        return model

    monkeypatch.setattr("smolvlm_fms.hf.certificate_sides.load_model", load)


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_little_wrong_is_not_ok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    folder = idefics3(tmp_path)
    perturb(monkeypatch, change)
    report = run(folder)
    assert not report["ok"] and any(name.endswith("logits") for name in failed(report))
    assert not any(name.endswith(("ids", "pixels", "features")) for name in failed(report))


def test_noise_of_the_reference_is_no_excuse(tmp_path: Path) -> None:
    """Logits of thousands move by over 1e-3 between transformers' own kinds of attention: told, not allowed."""
    folder = idefics3(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    logits = [check for check in run(folder)["checks"] if check["name"].endswith("logits")]
    assert max(check["reference_noise"] for check in logits) > 1e-3
    assert all(check["bound"] == 1e-4 and check["ok"] == (check["max_abs"] <= 1e-4) for check in logits)


def test_a_wrong_tower_shows_in_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = idefics3(tmp_path)
    perturb(monkeypatch, tower_epsilon)
    assert any(name.endswith("features") for name in failed(run(folder)))


@pytest.mark.parametrize("change", [interleaved_channels], ids=lambda change: change.__name__)
def test_bf16_is_no_excuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    folder = smolvlm2(tmp_path)
    perturb(monkeypatch, change)
    assert not run(folder, dtype="bfloat16")["ok"]


def test_the_bound_is_the_references_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same bounds, whatever our side computes."""
    folder = smolvlm2(tmp_path)
    before = [(c["bound"], c["reference_noise"]) for c in run(folder)["checks"]]
    perturb(monkeypatch, interleaved_channels)
    assert [(c["bound"], c["reference_noise"]) for c in run(folder)["checks"]] == before


def test_the_command_prints_markdown(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(smolvlm2(tmp_path)), "--new-tokens", "2", "--markdown"])
    assert done.exit_code == 0
    assert "| check | max abs difference | bound | reference's own noise | agree | verdict |" in done.output
    assert "| small picture: pixels | 0 | 7.9e-03 |  | 1.0000 | ok |" in done.output


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="float16"):
        run(smolvlm2(tmp_path), dtype="float16")
