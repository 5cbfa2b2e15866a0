"""Reading and writing checkpoint folders: the audit, formats, dtypes, memory, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolvlm_fms.errors import CheckpointError, ConfigurationError, FetchError, UnsafeCheckpointError
from smolvlm_fms.fms_bridge.loading import load_model, resolve_folder
from smolvlm_fms.fms_bridge.saving import save_pretrained
from tests.tiny_models import build_checkpoint, make_batch

DOWN = "model.text_model.layers.1.mlp.down_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.text_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("plain"), "smolvlm")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"] |= values.pop("text", {})
    path.write_text(json.dumps(config | values), encoding="utf-8")


def logits(model: Any, folder: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**make_batch(folder, [1, 2]))
    return result


# ── the audit ──


def test_missing_tensors_are_named(folder: Path) -> None:
    edit(folder, lambda state: state.pop(DOWN))
    with pytest.raises(CheckpointError, match=rf"1 missing: {DOWN}\."):
        load_model(folder)


def test_unexpected_tensors_are_named(folder: Path) -> None:
    edit(folder, lambda state: state.update({"model.perceiver.latents": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.perceiver\.latents"):
        load_model(folder)


def test_misshapen_tensors_are_named_with_both_shapes(folder: Path) -> None:
    edit(folder, lambda state: state.update({DOWN: torch.zeros(36, 49)}))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is \(36, 49\), not \(36, 50\)"):
        load_model(folder)


def test_nothing_is_read_before_the_audit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolvlm_fms.fms_bridge.loading import Checkpoint

    edit(folder, lambda state: state.pop(DOWN))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("tensors were read before the audit"))
    with pytest.raises(CheckpointError, match="missing"):
        load_model(folder)


def test_another_configuration_names_all_three_kinds(folder: Path) -> None:
    configure(folder, text={"num_hidden_layers": 2, "intermediate_size": 60})
    with pytest.raises(CheckpointError, match=r"9 unexpected: .* and 4 more\. 6 of another shape"):
        load_model(folder)


# ── files ──


def test_shards_with_an_index(original: Path, tmp_path: Path) -> None:
    sharded = build_checkpoint(tmp_path, "smolvlm", max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    (sharded / "adapter.safetensors").write_bytes(b"not in the index, not read")
    assert torch.equal(logits(load_model(sharded), original), logits(load_model(original), original))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = build_checkpoint(tmp_path, "smolvlm", max_shard_size="40KB")
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of the files its index names: model-00002"):
        load_model(sharded)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"a": {}}'])
def test_damaged_indices(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="index"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, name: str) -> None:
    index = {"weight_map": {DOWN: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_files_cut_short(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors"):
        load_model(folder)


def test_bytes_that_are_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused_unopened(folder: Path, name: str, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it ran"),)

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnsafeCheckpointError, match=name):
        load_model(folder)
    assert not (tmp_path / "it ran").exists()


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no \\*\\.safetensors"):
        load_model(folder)


def test_a_tensor_in_two_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"twice: in a\.safetensors and in b\.safetensors"):
        load_model(folder)


def test_other_models(folder: Path) -> None:
    configure(folder, model_type="llava_onevision")
    with pytest.raises(ConfigurationError, match="'llava_onevision' is not supported"):
        load_model(folder)


@pytest.mark.parametrize("name", ["there/is/none", "./none", "none", "~/none", "a b/c", "a/b;rm -rf"])
def test_names_that_are_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(FetchError, match="no folder"):
        load_model(name)


def test_a_file_is_not_a_folder(original: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(original / "config.json")


def test_hub_ids_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match="'nobody/nothing'"):
        resolve_folder("nobody/nothing")


def test_hub_downloads_take_no_pickles(monkeypatch: pytest.MonkeyPatch, original: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(original)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_folder("some/model", revision="v2") == original
    assert (asked["name"], asked["revision"]) == ("some/model", "v2")
    from fnmatch import fnmatch

    names = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.safetensors", "tokenizer.json"]
    taken = [n for n in names if any(fnmatch(n, pattern) for pattern in asked["allow_patterns"])]
    assert taken == ["model.safetensors", "tokenizer.json"]


def test_older_names_load(folder: Path, original: Path) -> None:
    def rename(state: dict[str, Tensor]) -> None:
        for name in list(state):
            older = name.replace("model.text_model.", "model.text_model.model.").replace("model.vision", "vision")
            state[older] = state.pop(name)
        state["model.text_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    edit(folder, rename)
    assert torch.equal(logits(load_model(folder), original), logits(load_model(original), original))


# ── the head ──


def test_a_tied_head_is_one_tensor(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "tied")
    assert HEAD not in load_file(folder / "model.safetensors")
    model = load_model(folder)
    assert model.text_model.head.weight is model.text_model.base_model.embedding.weight
    assert "text_model.head.weight" not in dict(model.named_parameters())  # counted, trained and moved once


def test_a_head_stored_twice_is_tied(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "tied")
    expected = logits(load_model(folder), folder)
    edit(folder, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    model = load_model(folder)
    assert model.text_model.head.weight is model.text_model.base_model.embedding.weight
    edit(folder, lambda state: state.pop(EMBEDDING))  # the other name alone is enough, as in transformers
    assert torch.equal(logits(load_model(folder), folder), expected)


def test_different_tensors_are_never_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers 5: the configuration is wrong, and the tensors win."""
    folder = build_checkpoint(tmp_path, "tied")
    edit(folder, lambda state: state.update({HEAD: state[EMBEDDING] + 1}))
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
    assert not model.config.tie_word_embeddings and "two different tensors" in caplog.text
    assert not torch.equal(model.text_model.head.weight, model.text_model.base_model.embedding.weight)


def test_the_text_configuration_ties_where_there_is_no_head(folder: Path) -> None:
    edit(folder, lambda state: state.pop(HEAD))
    with pytest.raises(CheckpointError, match=rf"1 missing: {HEAD}"):
        load_model(folder)
    configure(folder, text={"tie_word_embeddings": True})
    assert load_model(folder).config.tie_word_embeddings


def test_an_untied_checkpoint_stays_untied(original: Path) -> None:
    model = load_model(original)
    assert model.text_model.head.weight is not model.text_model.base_model.embedding.weight


# ── dtypes, devices, parts ──


def test_the_checkpoints_dtype_is_kept(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "smolvlm", dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(folder, dtype=torch.float32).parameters()} == {torch.float32}


def test_mixed_dtypes_take_the_configurations(folder: Path) -> None:
    edit(folder, lambda state: state.update({DOWN: state[DOWN].bfloat16()}))
    configure(folder, dtype="bfloat16")
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}


def test_float16_overflow_is_refused(folder: Path) -> None:
    edit(folder, lambda state: state[DOWN].view(-1)[:1].fill_(1e5))
    with pytest.raises(CheckpointError, match=r"down_proj|w2.*1e\+05"):
        load_model(folder, dtype=torch.float16)
    assert load_model(folder, dtype=torch.bfloat16)


def test_integer_dtypes_are_refused(original: Path) -> None:
    with pytest.raises(ConfigurationError, match="int8"):
        load_model(original, dtype=torch.int8)


def test_evaluation_mode_and_no_meta_tensors(original: Path) -> None:
    model = load_model(original)
    assert not model.training
    assert not any(t.is_meta for t in model.state_dict().values())


def test_vision_only(original: Path) -> None:
    whole, part = load_model(original), load_model(original, vision_only=True)
    names = {name.split(".")[0] for name in part.state_dict()}
    assert names == {"vision_tower", "connector", "text_model"}
    assert [n for n in part.state_dict() if n.startswith("text_model")] == ["text_model.base_model.embedding.weight"]
    pixels = make_batch(original, [2])["pixel_values"]
    with torch.no_grad():
        assert torch.equal(part.encode_images(pixels).features, whole.encode_images(pixels).features)
    with pytest.raises(CheckpointError, match="vision_only"):
        save_pretrained(part, original.parent / "part")


def test_configuration_changes(original: Path) -> None:
    model = load_model(original, fused_weights=False)
    assert "text_model.base_model.layers.0.attn.in_proj.query.weight" in model.state_dict()
    torch.testing.assert_close(logits(model, original), logits(load_model(original), original))
    with pytest.raises(ConfigurationError, match="fuse_weights"):
        load_model(original, fuse_weights=False)


def test_progress_is_reported(original: Path) -> None:
    seen: list[float] = []
    load_model(original, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 4


# ── saving ──


@pytest.mark.parametrize("fused", [True, False])
def test_our_own_format_loads_into_either_form(original: Path, tmp_path: Path, fused: bool) -> None:
    save_pretrained(load_model(original, fused_weights=fused), tmp_path, source="fms")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("qkv_fused" in name for name in names) == fused
    expected = logits(load_model(original), original)
    for wanted in (True, False):
        model = load_model(tmp_path, fused_weights=wanted)
        torch.testing.assert_close(logits(model, original), expected)


def test_saving_over_the_folder_that_the_weights_are_mapped_from(folder: Path, original: Path) -> None:
    expected = logits(load_model(original), original)
    model = load_model(folder)
    save_pretrained(model, folder, max_shard_size="40KB")
    assert torch.equal(logits(model, original), expected)
    assert torch.equal(logits(load_model(folder), original), expected)
    assert not (folder / "model.safetensors").exists() and (folder / "model.safetensors.index.json").exists()
    save_pretrained(model, folder)
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(load_model(folder), original), expected)
    assert not list(folder.glob(".*"))


def test_saving_in_another_dtype(original: Path, tmp_path: Path) -> None:
    save_pretrained(load_model(original), tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_what_cannot_be_saved(original: Path, tmp_path: Path) -> None:
    from smolvlm_fms.model.smolvlm import SmolVLM

    model = load_model(original)
    with pytest.raises(CheckpointError, match="'gguf'"):
        save_pretrained(model, tmp_path, source="gguf")
    with torch.device("meta"):
        empty = SmolVLM(model.config)
    with pytest.raises(CheckpointError, match="no values"):
        save_pretrained(empty, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        save_pretrained(model, tmp_path / "file")


# ── memory ──

MEASURE = """
import sys
from pathlib import Path
from smolvlm_fms.fms_bridge import loading
import smolvlm_fms.model.smolvlm
def memory(name):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
model = loading.load_model(sys.argv[1])
touched = sum(float(p.detach().sum()) for p in model.parameters())  # every page in
print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_weights_are_never_in_memory_twice(tmp_path: Path) -> None:
    """Peak memory of loading and reading every weight: the weights, and the code that is imported meanwhile."""
    from smolvlm_fms.config_presets import PRESETS
    from smolvlm_fms.model.smolvlm import SmolVLM

    model = SmolVLM(PRESETS["256m_instruct"].updated(text={"num_hidden_layers": 6}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.01)
    save_pretrained(model, tmp_path)
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak, weights = map(int, out.stdout.split())
    assert weights > 500_000
    assert peak < weights + 100_000, f"peak {peak} KiB for {weights} KiB of weights"
