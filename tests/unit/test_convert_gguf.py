"""``convert --to gguf``: every tensor and constant, read by the gguf package, against the Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.export import convert
from smolvlm_fms.fms_bridge.gguf import PRE_TOKENIZERS
from tests.tiny_llava import build_llava
from tests.tiny_models import build_checkpoint

Types = gguf.GGMLQuantizationType
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}


def checkpoint(folder: Path, family: str, **options: Any) -> Path:
    with torch.no_grad():
        return build_checkpoint(folder, family, processor=True, **options)


def files(out: Path) -> tuple[gguf.GGUFReader, gguf.GGUFReader]:
    (vision,) = out.glob("mmproj-*.gguf")
    (text,) = [path for path in out.glob("*.gguf") if path != vision]
    return gguf.GGUFReader(text), gguf.GGUFReader(vision)


def field(reader: gguf.GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def expected(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names that the gguf package itself gives them; q and k as llama.cpp turns
    them: from halves to pairs, head by head."""
    text = config["text_config"]
    words = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text["num_hidden_layers"])
    tower = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config["vision_config"]["num_hidden_layers"])
    result = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        table, theirs = (words, name.replace("model.text_model.", "model.")) if "vision" not in name else (tower, name)
        if "connector" in name:
            table = tower
        target = table.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        if "text_model" in name and ("q_proj" in name or "k_proj" in name):
            heads = text["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        result[target] = tensor
    return result


@pytest.mark.parametrize("family", ["smolvlm", "idefics3", "grid27", "tied", "llama3_rope", "granite"])
def test_every_tensor_is_the_checkpoints(family: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", family)
    config = json.loads((source / "config.json").read_text())
    result = convert(source, tmp_path / "out", "gguf")
    assert result.ok, result.checks
    wanted = expected(source, config)
    if family == "tied":
        wanted.pop("output.weight", None)
    found = {tensor.name: tensor for reader in files(tmp_path / "out") for tensor in reader.tensors}
    factors = found.pop("rope_freqs.weight", None)
    assert (factors is not None) == (family == "llama3_rope")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].tensor_type == Types.F32
        assert [int(n) for n in reversed(found[name].shape)] == list(tensor.shape)
        assert np.array_equal(found[name].data.reshape(tensor.shape), tensor.numpy()), name


def test_constants(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "granite")
    assert convert(source, tmp_path / "out", "gguf").ok
    text, vision = files(tmp_path / "out")
    said = {
        "general.architecture": "granite", "general.type": "model", "granite.block_count": 3,
        "granite.embedding_length": 36, "granite.feed_forward_length": 50, "granite.attention.head_count": 9,
        "granite.attention.head_count_kv": 3, "granite.attention.key_length": 4, "granite.rope.dimension_count": 4,
        "granite.rope.freq_base": 100000.0, "granite.context_length": 512, "granite.vocab_size": 464,
        "granite.embedding_scale": 6.0, "granite.residual_scale": 0.5, "granite.logit_scale": 1.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.padding_token_id": 2,
    }  # fmt: skip
    assert {name: field(text, name) for name in said} == said
    assert field(text, "granite.attention.scale") == pytest.approx(0.3)
    said = {
        "general.architecture": "clip", "general.type": "mmproj", "clip.has_vision_encoder": True,
        "clip.projector_type": "idefics3", "clip.use_gelu": True, "clip.vision.projection_dim": 36,
        "clip.vision.image_size": 32, "clip.vision.patch_size": 8, "clip.vision.embedding_length": 48,
        "clip.vision.feed_forward_length": 64, "clip.vision.block_count": 2, "clip.vision.attention.head_count": 4,
        "clip.vision.projector.scale_factor": 2, "clip.vision.preproc_image_size": 128,
        "clip.vision.image_mean": [0.5, 0.5, 0.5], "clip.vision.image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    assert {name: field(vision, name) for name in said} == said


def test_the_tokenizer_row_by_row(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "smolvlm")
    assert convert(source, tmp_path / "out", "gguf").ok
    text, _ = files(tmp_path / "out")
    content = json.loads((source / "tokenizer.json").read_text())
    tokens, kinds = field(text, "tokenizer.ggml.tokens"), field(text, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 464  # one for every row of the embeddings
    assert all(tokens[i] == token for token, i in content["model"]["vocab"].items())
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    assert all(tokens[i] == token and kinds[i] == 3 for i, token in special.items())
    assert tokens[-1] == "[PAD463]" and kinds[-1] == 5
    assert field(text, "tokenizer.ggml.eot_token_id") == tokens.index("<end_of_utterance>")
    assert field(text, "tokenizer.chat_template") == (source / "chat_template.jinja").read_text()


@pytest.mark.parametrize(("quantize", "kind"), [("int8", Types.Q8_0), ("int4", Types.Q4_0)])
def test_quantised_blocks_are_llama_cpps(quantize: str, kind: Types, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "smolvlm", text=WIDE, dtype=torch.bfloat16)
    result = convert(source, tmp_path / "out", "gguf", quantize=quantize)
    assert result.ok, result.checks
    wanted = expected(source, json.loads((source / "config.json").read_text()))
    text, vision = files(tmp_path / "out")
    seen = set()
    for tensor in text.tensors:
        rows = wanted[tensor.name].float().numpy()
        outer = tensor.name in ("token_embd.weight", "output.weight")
        chosen = Types.F32 if rows.ndim == 1 else Types.Q8_0 if outer else kind
        assert tensor.tensor_type == chosen, tensor.name
        assert np.array_equal(tensor.data, gguf.quantize(rows, chosen).reshape(tensor.data.shape))
        seen.add(chosen)
    assert seen == {Types.F32, Types.Q8_0, kind}
    assert {t.tensor_type for t in vision.tensors} == {Types.F32, Types.BF16}


def test_a_wrong_constant_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "source", "smolvlm")
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda self, value: self.add_float32(
        f"{self.arch}.rope.freq_base", 2 * value))  # fmt: skip
    result = convert(source, tmp_path / "out", "gguf")
    wrong = {check.name: check.note for check in result.checks if not check.ok}
    assert "text.rope_theta" in wrong["constants"]
    assert "read again, text: logits" in wrong
    assert not (tmp_path / "out").exists()


def test_swapped_tensors_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolvlm_fms.export import gguf as module

    def swapped(model: Any) -> list[tuple[str, Tensor]]:
        named = dict(real(model))
        a, b = "blk.0.attn_q.weight", "blk.1.attn_q.weight"
        return list((named | {a: named[b], b: named[a]}).items())

    real = module.text_tensors
    monkeypatch.setattr(module, "text_tensors", swapped)
    result = convert(checkpoint(tmp_path / "source", "smolvlm"), tmp_path / "out", "gguf")
    assert "tensors" in {check.name for check in result.checks if not check.ok}


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "gelu", "smolvlm", vision={"hidden_act": "gelu"})
    with pytest.raises(ConfigurationError, match="no gelu"):
        convert(source, tmp_path / "out", "gguf")
    with torch.no_grad():
        llava = build_llava(tmp_path / "llava", "granite")
    with pytest.raises(ConfigurationError, match="LLaVA-Next"):
        convert(llava, tmp_path / "out", "gguf")
    source = checkpoint(tmp_path / "words", "smolvlm")
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="pre-tokenizer"):
        convert(source, tmp_path / "out", "gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        convert(source, tmp_path / "out", "gguf")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognised(name: str) -> None:
    from smolvlm_fms.export.gguf_metadata import pre_tokenizer_name

    steps = [dict(step) for step in PRE_TOKENIZERS[name]]
    steps[-1]["trim_offsets"] = False
    content = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert pre_tokenizer_name(content, Path("x")) == name
