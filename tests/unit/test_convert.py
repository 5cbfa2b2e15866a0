"""``convert``: what it takes, where it writes, what it refuses; a wrong result is found and not left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolvlm_fms.errors import CapacityError, CheckpointError, ConfigurationError, FetchError
from smolvlm_fms.export import Conversion, convert
from smolvlm_fms.export import output as output_module
from smolvlm_fms.export.checks import Inputs, compare, make_cases, own_forward
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf.peer import sees_pictures_right
from tests.tiny_llava import build_llava
from tests.tiny_models import build_checkpoint, load_peer, make_batch

# peft 0.21 asks transformers 5.23 by a name that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.no_grad():
        return build_checkpoint(tmp_path_factory.mktemp("source"), "smolvlm", processor=True)


def held(result: Conversion) -> bool:
    assert result.checks and all(check.ok for check in result.checks) is result.ok
    return result.ok


# ── what comes out ──


@pytest.mark.parametrize("family", ["smolvlm", "idefics3", "tied", "granite"])
def test_hf_gives_back_the_very_tensors(family: str, tmp_path: Path) -> None:
    with torch.no_grad():
        source = build_checkpoint(tmp_path / "source", family, processor=True)
    result = convert(source, tmp_path / "out", "hf")
    assert held(result)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    before.pop("lm_head.weight", None) if family == "tied" else None
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = {p.name for p in source.iterdir()} - {"model.safetensors", "config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} >= kept
    seen = "picture" if sees_pictures_right() else "text"
    assert {check.name for check in result.checks} >= {"weights read again", f"transformers, {seen}: logits"}


def test_fms_names_and_back(folder: Path, tmp_path: Path) -> None:
    assert held(convert(folder, tmp_path / "fms", "fms"))
    names = load_file(tmp_path / "fms" / "model.safetensors").keys()
    assert all(name.startswith(("vision_tower.", "connector.", "text_model.")) for name in names)
    assert held(convert(tmp_path / "fms", tmp_path / "hf", "hf"))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_dtype_is_that_of_the_files(folder: Path, tmp_path: Path) -> None:
    result = convert(folder, tmp_path / "out", "hf", dtype="bfloat16")
    assert held(result) and result.dtype == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    rounding = [check for check in result.checks if check.name.startswith("rounding")]
    assert rounding and 0 < (rounding[0].max_abs or 0) < 1


def test_the_bundled_model_in_its_own_dtype(tmp_path: Path) -> None:
    said: list[str] = []
    result = convert("demo", tmp_path / "out", "hf", say=said.append)
    assert said[0].startswith("reading") and said[-3:][0].endswith("100%") and said[-2:] == ["writing hf", "checking"]
    assert held(result)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("family", ["granite", "mistral", "vicuna"])
def test_llava_next_too(family: str, tmp_path: Path) -> None:
    with torch.no_grad():
        source = build_llava(tmp_path / "source", family)
    for to in ("hf", "fms"):
        result = convert(source, tmp_path / to, to)
        assert held(result), result.checks
    before, after = (load_model(path).state_dict() for path in (source, tmp_path / "fms"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ── adapters ──


def adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A random adapter of two linears in peft's format, made by peft on transformers' model."""
    import peft

    torch.manual_seed(1)
    model = load_peer(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=r".*text_model.*\.(q_proj|down_proj)", init_lora_weights=False, **settings
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_a_merged_adapter_computes_what_peft_computes(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    import peft

    lora = adapter(tmp_path / "lora", folder, **settings)
    batch = make_batch(folder, tiles=[1])
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(load_peer(folder), lora)(**batch).logits
        plain = load_peer(folder)(**batch).logits
    for number, arguments in enumerate([{"model": folder, "adapter": lora}, {"model": lora}]):
        out = tmp_path / f"merged{number}"
        assert held(convert(out=out, to="hf", **arguments))
        with torch.no_grad():
            found = load_peer(out)(**batch).logits
        assert (wanted - found).abs().max() < 1e-4 < (wanted - plain).abs().max()


def test_adapters_that_cannot_be_merged_are_refused(folder: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", folder)
    settings = json.loads((lora / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"peft_type": "LOHA"}):
        (lora / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(CheckpointError, match="plain LoRA"):
            convert(folder, tmp_path / "out", "hf", adapter=lora)
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(lora / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    save_file({k: v for k, v in tensors.items() if k != first}, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="half of a pair"):
        convert(folder, tmp_path / "out", "hf", adapter=lora)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        convert(folder, tmp_path / "out", "hf", adapter=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_run_stands_for_what_it_made(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: demo\n")
    with pytest.raises(CheckpointError, match="not finished"):
        convert(run, tmp_path / "out", "hf")
    (run / "final").symlink_to(folder)
    assert held(convert(run, tmp_path / "out", "hf"))


# ── where it goes ──


def test_nothing_is_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="force"):
            convert(folder, out, "hf", force=force)
    assert [p.name for p in out.iterdir()] == ["diary.txt"]
    with pytest.raises(CheckpointError, match="is a file"):
        convert(folder, out / "diary.txt", "hf")
    for inside in (folder, folder.parent):
        with pytest.raises(CheckpointError, match="holds the model that is converted"):
            convert(folder, inside, "hf", force=True)


def test_force_replaces_a_conversion(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert held(convert(folder, out, "fms"))
    (out / "left-over.txt").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(folder, out, "hf")
    assert held(convert(folder, out, "hf", force=True))
    assert not (out / "left-over.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no scratch folders


def test_a_wrong_result_is_found_and_not_left_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolvlm_fms.export import folders

    def damaged(model: Any, out: Path, **options: Any) -> None:
        model.text_model.base_model.dec_norm.weight.data[0] += 0.5
        save(model, out, **options)
        model.text_model.base_model.dec_norm.weight.data[0] -= 0.5

    save = folders.save_pretrained
    monkeypatch.setattr(folders, "save_pretrained", damaged)
    result = convert(folder, tmp_path / "out", "hf")
    assert not held(result)
    wrong = {check.name for check in result.checks if not check.ok}
    assert wrong >= {"weights read again", "transformers, text: logits"}
    assert not any(tmp_path.iterdir())


def test_tokens_that_are_equally_likely_agree(folder: Path) -> None:
    """In bfloat16 they are common: a comparison with the very same logits has nothing to report."""
    model = load_model(folder)
    model.text_model.head.weight.data[1::2] = model.text_model.head.weight.data[::2]
    forward = own_forward(model)

    def other_order(inputs: Inputs) -> torch.Tensor:
        """The same logits, the second of each pair of equal tokens a little likelier than the first."""
        logits = forward(inputs)
        assert torch.equal(logits[..., ::2], logits[..., 1::2])
        logits[..., 1::2] += logits.abs().max() * 1e-6
        return logits

    checks = compare(model, forward, make_cases(folder, model.config), bound=0.0)
    checks += compare(model, other_order, make_cases(folder, model.config))
    assert len(checks) == 8 and all(check.ok and check.agree == 1.0 for check in checks)


def test_too_little_space_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = output_module.shutil.disk_usage

    def small(path: Any) -> Any:
        return real(path)._replace(free=1000)

    monkeypatch.setattr(output_module.shutil, "disk_usage", small)
    with pytest.raises(CapacityError, match="MB free"):
        convert(folder, tmp_path / "out", "hf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"to": "tflite"}, ConfigurationError, "there are: hf, fms"),
        ({"to": "fms", "quantize": "int8"}, ConfigurationError, "cannot be written quantised"),
        ({"to": "hf", "quantize": "int3"}, ConfigurationError, "int8 or int4"),
        ({"to": "hf", "dtype": "int8"}, ConfigurationError, "dtype"),
        ({"to": "hf", "model": "no-such-model"}, FetchError, "no-such-model"),
    ],
)
def test_what_cannot_be_done_is_said_first(
    folder: Path, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        convert(**{"model": folder, "out": tmp_path / "out", **arguments})
    assert not any(tmp_path.iterdir())


def test_what_was_written_is_what_the_loader_reads(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", "fms")
    before, after = load_model(folder).state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
