"""GGUF files of a tiny Llama, written with the gguf package: weights, tokenizer, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.errors import CheckpointError, ConfigurationError, MissingDependencyError
from smolvlm_fms.fms_bridge.adapters import FAMILIES, to_hf
from smolvlm_fms.fms_bridge.gguf import GGUFText
from smolvlm_fms.model.smolvlm import SmolVLM

TEXT = TextConfig(
    vocab_size=12, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, pad_token_id=2,
)  # fmt: skip
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "1", "2", "ab", "Ċ", "é", "Ġa"]


def model_of(vocab: int = 16, **changes: Any) -> SmolVLM:
    vision = VisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = SmolVLM(
        SmolVLMConfig(vision, TEXT.updated(vocab_size=vocab), scale_factor=1, image_token_id=vocab - 1, **changes)
    )
    model.reset_parameters()
    return model


def write_gguf(path: Path, state: dict[str, Tensor], *, architecture: str = "llama", pre: str = "smollm") -> None:
    """As llama.cpp's converter does: Hugging Face's tensors, q and k permuted by heads, norms in fp32, rest Q8_0."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(TEXT.max_position_embeddings)
    writer.add_embedding_length(TEXT.hidden_size)
    writer.add_block_count(TEXT.num_hidden_layers)
    writer.add_feed_forward_length(TEXT.intermediate_size)
    writer.add_head_count(TEXT.num_attention_heads)
    writer.add_head_count_kv(TEXT.num_key_value_heads)
    writer.add_layer_norm_rms_eps(TEXT.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * 9)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, TEXT.num_hidden_layers)
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = TEXT.num_attention_heads if "q_proj" in name else TEXT.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        target = names.get_name(name.replace("model.text_model.", "model."), try_suffixes=(".weight",))
        data = tensor.numpy()
        kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(target, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text_of(model: SmolVLM) -> dict[str, Tensor]:
    state = to_hf(FAMILIES["smolvlm"], model.state_dict(), model.config)
    return {name: tensor for name, tensor in state.items() if "text_model" in name or name == "lm_head.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_under_our_names(tmp_path: Path, tied: bool) -> None:
    source = model_of(12, tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", text_of(source))
    file = GGUFText(tmp_path / "model.gguf")
    assert file.tied == tied
    assert file.config == TEXT
    target = model_of()  # four more rows, untied
    before = target.text_model.base_model.embedding.weight[12:].clone()
    file.load_into(target)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        expected, found = source(ids), target(ids)[..., :12]
    assert (expected - found).abs().max() < 0.05 * expected.std()  # Q8_0 keeps seven bits
    assert torch.equal(target.text_model.base_model.embedding.weight[12:], before)


def test_the_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", text_of(model_of(12, tie_word_embeddings=True)))
    tokenizer = Tokenizer.from_str(GGUFText(tmp_path / "model.gguf").tokenizer_json())
    assert tokenizer.encode("<|im_start|>ab a12").ids == [1, 8, 11, 6, 7]
    assert tokenizer.decode([8, 11, 6]) == "ab a1"


def test_other_files_are_refused(tmp_path: Path) -> None:
    state = text_of(model_of(12, tie_word_embeddings=True))
    path = tmp_path / "model.gguf"
    write_gguf(path, state)
    content = path.read_bytes()
    for damaged in (b"", b"GGUF", content[:300], b"\xff" * 999):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
            GGUFText(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFText(tmp_path / "none.gguf")
    write_gguf(path, state, pre="qwen2")
    with pytest.raises(ConfigurationError, match="'qwen2'"):
        GGUFText(path).tokenizer_json()
    del state["model.text_model.norm.weight"]
    write_gguf(path, state)
    with pytest.raises(CheckpointError, match="lacks 1 tensors, the first text_model"):
        GGUFText(path).load_into(model_of())
    with pytest.raises(CheckpointError, match="the model's is"):
        GGUFText(path).load_into(model_of(11))
    write_gguf(path, state, architecture="falcon")
    with pytest.raises(ConfigurationError, match="'falcon'"):
        GGUFText(path)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"smolvlm-fms\[gguf\]"):
        GGUFText("any.gguf")
