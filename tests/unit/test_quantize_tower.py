"""The check of an 8-bit tower: it measures what it says, and sees a tower that does not bear eight bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from smolvlm_fms.bundle import bundled
from smolvlm_fms.cli.convert import _print
from smolvlm_fms.engine.quantize_tower import _agreement, check_int8_tower
from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.export import convert


def test_the_bundled_tower_bears_eight_bits() -> None:
    pictures = sorted(bundled("pictures").glob("*.png"))[:4]
    report = check_int8_tower("demo", pictures, "What colour is it?", max_tokens=6)
    assert report.pictures == 4
    assert 0 < report.bf16_error < report.int8_error <= report.worst_int8_error < 0.15
    assert 0 <= report.answers_agree <= report.tokens_agree <= 1


def test_outliers_are_seen(tmp_path: Path) -> None:
    """A channel a thousand times larger than the rest takes all of a patch's scale, though the function is the same."""
    assert convert("demo", tmp_path / "bad", "hf").ok
    file = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(file)
    readers = {"layer_norm1": [f"self_attn.{part}_proj" for part in "qkv"], "layer_norm2": ["mlp.fc1"]}
    for name in [name for name in tensors if ".layer_norm" in name]:
        layer, norm, _ = name.rsplit(".", 2)
        tensors[name][0] *= 1024
        for reader in readers[norm] if name.endswith("weight") else []:
            tensors[f"{layer}.{reader}.weight"][:, 0] /= 1024
    save_file(tensors, file, metadata={"format": "pt"})
    pictures = sorted(bundled("pictures").glob("*.png"))[:1]
    bad = check_int8_tower(tmp_path / "bad", pictures, max_tokens=4)
    good = check_int8_tower("demo", pictures, max_tokens=4)
    assert bad.int8_error > 2 * good.int8_error


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [((1, 2, 3), (1, 2, 3), 1.0), ((1, 2, 3), (1, 9, 3), 1 / 3), ((1,), (1, 2), 0.5), ((), (), 1.0), ((1,), (), 0.0)],
)
def test_agreement_counts_to_the_first_difference(ours: tuple[int, ...], theirs: tuple[int, ...], share: float) -> None:
    assert _agreement(ours, theirs) == pytest.approx(share)


def test_convert_measures_it_when_asked_and_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = convert("demo", tmp_path / "out", "hf", quantize="int8", check_tower=True)
    found = {check.name: check for check in result.checks if check.name.startswith("int8 tower")}
    assert result.ok and found.keys() == {"int8 tower: features", "int8 tower: answers"}
    assert 0.9 < found["int8 tower: features"].agree < 1
    _print(result)
    printed = [line for line in capsys.readouterr().out.splitlines() if "int8 tower" in line]
    assert len(printed) == 2 and "bfloat16" in printed[0] and "% of tokens" in printed[1]
    with pytest.raises(ConfigurationError, match="'gguf'"):
        convert("demo", tmp_path / "gguf", "gguf", check_tower=True)
