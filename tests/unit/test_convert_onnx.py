"""``convert --to onnx``: onnxruntime's results, fed as its users feed it, against transformers' on the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.export import Conversion, convert
from smolvlm_fms.export.onnx_modules import Decoder, Embedding, VisionEncoder
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import hf_state_dict
from tests.tiny_llava import build_llava
from tests.tiny_models import FAMILIES, build_checkpoint, load_peer, make_batch

GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.no_grad():
        return build_checkpoint(tmp_path_factory.mktemp("source"), "smolvlm", processor=True)


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Conversion, Path]:
    out = tmp_path_factory.mktemp("onnx") / "out"
    return convert(folder, out, "onnx"), out


@pytest.fixture(scope="module")
def sessions(converted: tuple[Conversion, Path]) -> dict[str, Any]:
    return {
        name: onnxruntime.InferenceSession(converted[1] / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in GRAPHS
    }


def test_the_command_checks_what_it_wrote(converted: tuple[Conversion, Path]) -> None:
    result, out = converted
    assert result.ok and result.dtype == "float32"
    names = {check.name for check in result.checks}
    assert names >= {"onnxruntime, picture: logits", "onnxruntime, picture: text by its cache"}
    assert (out / "tokenizer.json").is_file() and (out / "preprocessor_config.json").is_file()
    for name in GRAPHS:
        onnx.checker.check_model(out / "onnx" / f"{name}.onnx")


def test_inputs_and_outputs_have_the_names_that_others_use(sessions: dict[str, Any]) -> None:
    cache = [f"{i}.{kind}" for i in range(3) for kind in ("key", "value")]
    wanted = {
        "vision_encoder": (["pixel_values", "pixel_attention_mask"], ["image_features"]),
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "decoder_model_merged": (
            ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in cache)],
            ["logits", *(f"present.{name}" for name in cache)],
        ),
    }
    found = {n: ([i.name for i in s.get_inputs()], [o.name for o in s.get_outputs()]) for n, s in sessions.items()}
    assert found == wanted


def embeddings(sessions: dict[str, Any], batch: dict[str, Tensor], image_token: int) -> Any:
    ids = batch["input_ids"].numpy()
    embedded = sessions["embed_tokens"].run(None, {"input_ids": ids})[0]
    if "pixel_values" in batch:
        feed = {
            "pixel_values": batch["pixel_values"].numpy(),
            "pixel_attention_mask": batch["pixel_attention_mask"].bool().numpy(),
        }
        features = sessions["vision_encoder"].run(None, feed)[0]
        embedded[ids == image_token] = features.reshape(-1, features.shape[-1])
    return embedded


def empty(rows: int) -> dict[str, Any]:
    shape = (rows, 3, 0, 4)
    return {f"past_key_values.{i}.{kind}": np.zeros(shape, np.float32) for i in range(3) for kind in ("key", "value")}


@pytest.mark.parametrize("tiles", [[1], [2, 0, 3], [0, 0]])
def test_a_ragged_batch_and_its_cache_give_transformers_logits(
    folder: Path, sessions: dict[str, Any], tiles: list[int]
) -> None:
    """Rows with other numbers of tiles and left padding; then one more token a row through the cache."""
    image_token = json.loads((folder / "config.json").read_text())["image_token_id"]
    batch = make_batch(folder, tiles=tiles)
    peer = load_peer(folder)
    mask = batch["attention_mask"].numpy()
    feed = {
        "inputs_embeds": embeddings(sessions, batch, image_token),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clip(0),
    }
    logits, *present = sessions["decoder_model_merged"].run(None, feed | empty(len(tiles)))
    with torch.no_grad():
        wanted = peer(**batch).logits
    real = batch["attention_mask"].bool()
    assert (torch.from_numpy(logits) - wanted)[real].abs().max() < 1e-4
    after = torch.full((len(tiles), 1), 17)
    longer = {**batch, "input_ids": torch.cat((batch["input_ids"], after), 1)}
    longer["attention_mask"] = torch.cat((batch["attention_mask"], torch.ones_like(after)), 1)
    with torch.no_grad():
        wanted = peer(**longer).logits[:, -1]
    mask = longer["attention_mask"].numpy()
    feed = {
        "inputs_embeds": sessions["embed_tokens"].run(None, {"input_ids": after.numpy()})[0],
        "attention_mask": mask,
        "position_ids": mask.sum(1, keepdims=True) - 1,
    }
    logits, *_ = sessions["decoder_model_merged"].run(None, feed | dict(zip(empty(1), present, strict=True)))
    assert (torch.from_numpy(logits)[:, 0] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_modules_compute_what_the_model_computes(family: str, tmp_path: Path) -> None:
    with torch.no_grad():
        source = build_checkpoint(tmp_path, family)
        model = load_model(source)
        state, config = hf_state_dict(model), model.config
        batch = make_batch(source, tiles=[2, 0, 1])
        ids = batch["input_ids"]
        embedded = Embedding(state)(ids)
        features = VisionEncoder(state, config)(batch["pixel_values"], batch["pixel_attention_mask"].bool())
        assert len(features) == 3
        embedded[ids == config.image_token_id] = features.flatten(0, 1)
        text = config.text
        past = [(torch.zeros(3, text.num_key_value_heads, 0, text.head_dim),) * 2 for _ in range(3)]
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        found, _ = Decoder(state, config)(embedded, batch["attention_mask"], positions, past)
        wanted = model(**batch)
    real = batch["attention_mask"].bool()
    assert (found - wanted)[real].abs().max() < 1e-4 * wanted.abs().max()


def test_what_cannot_be_written_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="float32"):
        convert(folder, tmp_path / "out", "onnx", dtype="bfloat16")
    with pytest.raises(ConfigurationError, match="cannot be written quantised"):
        convert(folder, tmp_path / "out", "onnx", quantize="int8")
    with torch.no_grad():
        llava = build_llava(tmp_path / "llava", "granite")
    with pytest.raises(ConfigurationError, match="LLaVA-Next"):
        convert(llava, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
