"""What a GGUF file says besides its tensors: shapes and constants, the tokenizer, how pictures are prepared.

Keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md, and for the vision part ``tools/mtmd/clip-impl.h`` of
llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.fms_bridge.gguf import ACTIVATIONS, PRE_TOKENIZERS, gguf_package
from smolvlm_fms.processing.factory import load_processor

__all__ = ["pre_tokenizer_name", "write_text_metadata", "write_vision_metadata"]


def write_text_metadata(writer: Any, config: Any, source: Path, kind: str) -> None:
    """The text model's constants and the tokenizer in ``source``. ``kind``: the type of most tensors, ``"Q8_0"``."""
    text = config.text
    _write_general(writer, "model", source, kind)
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    if text.model_type == "granite":
        writer.add_attention_scale(text.attention_scale)
        writer.add_embedding_scale(text.embedding_multiplier)
        writer.add_residual_scale(text.residual_multiplier)
        writer.add_logit_scale(1.0)  # SmolVLM does not divide its logits; llama.cpp's Granite would
    _write_tokenizer(writer, text.vocab_size, source)


def write_vision_metadata(writer: Any, config: Any, source: Path, kind: str) -> None:
    """The tower's constants, and the size, mean and deviation that pictures are brought to."""
    vision = config.vision
    _write_general(writer, "mmproj", source, kind)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_projection_dim(config.text.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_projector_scale_factor(config.scale_factor)
    key = ACTIVATIONS[vision.hidden_act]
    if key is not None:
        writer.add_bool(key, True)
    pictures = load_processor(source).image_processor
    writer.add_vision_image_mean([float(value) for value in pictures.image_mean])
    writer.add_vision_image_std([float(value) for value in pictures.image_std])
    writer.add_vision_preproc_image_size(int(pictures.size["longest_edge"]))


def _write_general(writer: Any, kind: str, source: Path, types: str) -> None:
    package = gguf_package()
    writer.add_type(kind)
    writer.add_name(source.resolve().name)
    prefix = "ALL" if types == "F32" else "MOSTLY"
    writer.add_file_type(package.LlamaFileType[f"{prefix}_{types}"])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)


def _write_tokenizer(writer: Any, vocab_size: int, source: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise ConfigurationError(f"{source} holds no tokenizer.json, and a GGUF file needs its tokenizer.")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    processor = load_processor(source)
    tokenizer = processor.tokenizer
    tokens, kinds = _vocabulary(content, vocab_size, source)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer_name(content, source))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
        "eot": tokenizer.get_vocab().get("<end_of_utterance>"),
    }
    for name, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(int(value))
    # Whether text gets a first token is the tokenizer's own business; llama.cpp would guess.
    plain, framed = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    writer.add_add_bos_token(bool(framed and framed[0] == ids["bos"] and len(framed) > len(plain)))
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _vocabulary(content: dict[str, Any], size: int, source: Path) -> tuple[list[str], list[int]]:
    """Every row of the embeddings as a token, with its kind; rows that no token uses are called so."""
    kinds = gguf_package().TokenType
    named: dict[int, tuple[str, int]] = {
        i: (token, int(kinds.NORMAL)) for token, i in content["model"].get("vocab", {}).items()
    }
    for token in content["added_tokens"]:
        named[token["id"]] = (token["content"], int(kinds.CONTROL if token["special"] else kinds.USER_DEFINED))
    if max(named) >= size:
        raise ConfigurationError(
            f"{source}: the tokenizer has {max(named) + 1} tokens, the model {size} rows for them."
        )
    rows = [named.get(i, (f"[PAD{i}]", int(kinds.UNUSED))) for i in range(size)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def pre_tokenizer_name(content: dict[str, Any], source: Path) -> str:
    """llama.cpp's name of the way in which a tokenizer.json cuts text before BPE; raises ConfigurationError."""
    if content["model"].get("type") != "BPE" or content.get("normalizer"):
        raise ConfigurationError(f"{source}: only byte-level BPE without a normaliser can be written as GGUF.")
    found = content.get("pre_tokenizer") or {}
    parts = found["pretokenizers"] if found.get("type") == "Sequence" else [found]

    def essence(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # trim_offsets says where tokens lie, not what they are; the others at their defaults may be left out.
        defaults = {"ByteLevel": {"use_regex": True}, "Split": {"invert": False}}
        return [
            {**defaults.get(s.get("type", ""), {}), **{k: v for k, v in s.items() if k != "trim_offsets"}}
            for s in steps
        ]

    for name, known in PRE_TOKENIZERS.items():
        if essence(parts) == essence(known):
            return name
    raise ConfigurationError(
        f"{source}: llama.cpp knows the pre-tokenizer of this tokenizer.json under no name that is known here "
        f"({', '.join(PRE_TOKENIZERS)}): {json.dumps(found)[:200]}"
    )
