"""GGUF files (llama.cpp's format): names, and what reads text models, tokenizers and vision parts out of them.

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

from smolvlm_fms.config import TextConfig, VisionConfig
from smolvlm_fms.errors import CheckpointError, ConfigurationError, MissingDependencyError
from smolvlm_fms.fms_bridge.adapters import EMBEDDING, HEAD, Rules, rename, split

__all__ = ["ACTIVATIONS", "PRE_TOKENIZERS", "TEXT_NAMES", "VISION_NAMES", "GGUFText", "GGUFVision", "gguf_package"]

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
TEXT_NAMES: Rules = {
    "token_embd": "text_model.base_model.embedding",
    "output_norm": "text_model.base_model.dec_norm",
    "output": "text_model.head",
    **{f"blk.{{}}.{theirs}": f"text_model.base_model.layers.{{}}.{ours}" for theirs, ours in _LAYER.items()},
}
"""GGUF's module paths to ours (github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

_VISION_LAYER = {
    "ln1": "ln1",
    "ln2": "ln2",
    "attn_q": "attn.in_proj.query",
    "attn_k": "attn.in_proj.key",
    "attn_v": "attn.in_proj.value",
    "attn_out": "attn.dense",
    "ffn_up": "mlp.w1",
    "ffn_down": "mlp.w2",
}
VISION_NAMES: Rules = {
    "v.patch_embd": "vision_tower.embeddings.patch_embedding",
    "v.position_embd": "vision_tower.embeddings.position_embedding",
    "v.post_ln": "vision_tower.post_layernorm",
    "mm.model.fc": "connector.proj",
    **{f"v.blk.{{}}.{theirs}": f"vision_tower.layers.{{}}.{ours}" for theirs, ours in _VISION_LAYER.items()},
}
"""The same for the file with tower and connector (``tools/mtmd`` in llama.cpp's sources reads these)."""

ACTIVATIONS = {"gelu_pytorch_tanh": "clip.use_gelu", "silu": "clip.use_silu", "quick_gelu": None}
"""The tower's activations that llama.cpp has, and the key that says so. Its GELU is the tanh form."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Token types of ``tokenizer.ggml.token_type``."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False},
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}
"""llama.cpp's names of the ways to cut text before byte-pair encoding, and what tokenizer.json calls them."""


def gguf_package() -> Any:
    """The ``gguf`` package; raises MissingDependencyError."""
    try:
        import gguf
    except ImportError:
        raise MissingDependencyError("GGUF files need the gguf package: pip install 'smolvlm-fms[gguf]'.") from None
    return gguf


class _File:
    """A GGUF file: its fields, and its tensors under our names."""

    names: Rules
    architectures: tuple[str, ...]

    def __init__(self, path: str | Path) -> None:
        self._gguf = gguf_package()
        self.path = Path(path)
        try:
            self._reader = self._gguf.GGUFReader(self.path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path} cannot be read as GGUF (cut short, or damaged?): {error}") from error
        self.architecture = self._field("general.architecture")
        if self.architecture not in self.architectures:
            known = " and ".join(self.architectures)
            raise ConfigurationError(
                f"{self.path} holds the architecture {self.architecture!r}; only {known} can be read here."
            )

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def _number(self, name: str) -> Any:
        value = self._field(name)
        if value is None:
            raise ConfigurationError(f"{self.path} does not say {name}.")
        return value

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, dequantised to float32, under the name of our (unfused) module."""
        for tensor in self._reader.tensors:
            if tensor.name == "rope_freqs.weight":
                continue  # computed from rope_scaling here
            name = rename(self.names, tensor.name)
            if name is None:
                raise CheckpointError(f"{self.path} holds {tensor.name}, which this kind of model does not have.")
            values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
            values = values if values.flags.writeable else values.copy()  # plain floats come as the mapped file itself
            yield name, torch.from_numpy(values.reshape([int(n) for n in reversed(tensor.shape)]))


class GGUFText(_File):
    """A Llama- or Granite-shaped text model in a GGUF file: its configuration, its weights and its tokenizer.

    Raises CheckpointError for a file that cannot be read, ConfigurationError for another architecture, and
    MissingDependencyError without the ``gguf`` package.
    """

    names = TEXT_NAMES
    architectures = ("llama", "granite")

    @property
    def tied(self) -> bool:
        """Whether the file has no head of its own and the embeddings serve as one."""
        return all(tensor.name != "output.weight" for tensor in self._reader.tensors)

    @property
    def config(self) -> TextConfig:
        """The text configuration. GGUF keeps the norm's epsilon in single precision; it is rounded to six digits.

        Llama 3's stretching of the rotary frequencies is not among them: the file holds it as ``rope_factors``.
        """
        arch = self.architecture
        heads = self._number(f"{arch}.attention.head_count")
        scales: dict[str, Any] = {}
        if arch == "granite":
            names = {
                "embedding_multiplier": "embedding_scale",
                "residual_multiplier": "residual_scale",
                "attention_multiplier": "attention.scale",
                "logits_scaling": "logit_scale",
            }
            scales = {ours: _short(self._number(f"granite.{theirs}")) for ours, theirs in names.items()}
        return TextConfig(
            model_type=arch,
            vocab_size=self._field(f"{arch}.vocab_size") or len(self._field("tokenizer.ggml.tokens")),
            hidden_size=self._number(f"{arch}.embedding_length"),
            intermediate_size=self._number(f"{arch}.feed_forward_length"),
            num_hidden_layers=self._number(f"{arch}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._field(f"{arch}.attention.head_count_kv", heads),
            head_dim=self._field(f"{arch}.attention.key_length"),
            max_position_embeddings=self._number(f"{arch}.context_length"),
            rms_norm_eps=_short(self._number(f"{arch}.attention.layer_norm_rms_epsilon")),
            rope_theta=self._field(f"{arch}.rope.freq_base", 10000.0),
            attention_bias=any(tensor.name == "blk.0.attn_q.bias" for tensor in self._reader.tensors),
            mlp_bias=any(tensor.name == "blk.0.ffn_up.bias" for tensor in self._reader.tensors),
            bos_token_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._field("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._field("tokenizer.ggml.padding_token_id"),
            **scales,
        )

    @property
    def rope_factors(self) -> Tensor | None:
        """What each rotary frequency is divided by (head_dim / 2,), where the file says so (Llama 3 does)."""
        for tensor in self._reader.tensors:
            if tensor.name == "rope_freqs.weight":
                return torch.from_numpy(tensor.data.copy())
        return None

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
        """The content of a ``tokenizer.json``: byte-level BPE with one of PRE_TOKENIZERS."""
        kind, splitting = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if kind != "gpt2" or splitting not in PRE_TOKENIZERS:
            raise ConfigurationError(
                f"{self.path} has a {kind!r} tokenizer with pre-tokenizer {splitting!r}; known: gpt2 with "
                f"{', '.join(PRE_TOKENIZERS)}."
            )
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        kinds: list[int] = self._field("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        words = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
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
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[splitting]},
                "post_processor": None,
                "decoder": _BYTE_LEVEL,
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": splitting == "llama-bpe",
                    "vocab": words,
                    "merges": [merge.split(" ", 1) for merge in self._field("tokenizer.ggml.merges")],
                },
            },
            ensure_ascii=False,
        )


class GGUFVision(_File):
    """Tower and connector in an ``mmproj`` file of the kind ``idefics3``."""

    names = VISION_NAMES
    architectures = ("clip",)

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        kind = self._field("clip.projector_type")
        if kind != "idefics3":
            raise ConfigurationError(f"{self.path} holds a projector of the kind {kind!r}; only idefics3 is supported.")

    @property
    def config(self) -> VisionConfig:
        """The tower's configuration."""
        said = [name for name, key in ACTIVATIONS.items() if key is not None and self._field(key)]
        fields = {
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "image_size": "image_size",
            "patch_size": "patch_size",
        }
        return VisionConfig(
            hidden_act=said[0] if said else "quick_gelu",
            layer_norm_eps=_short(self._number("clip.vision.attention.layer_norm_epsilon")),
            **{ours: self._number(f"clip.vision.{theirs}") for ours, theirs in fields.items()},
        )

    @property
    def scale_factor(self) -> int:
        """Patches along a side that become one image token."""
        return int(self._number("clip.vision.projector.scale_factor"))


def _short(value: float) -> float:
    """A single-precision number as it was meant: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.6g}")
