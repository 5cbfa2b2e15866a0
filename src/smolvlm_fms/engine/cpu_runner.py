"""The fast path on the CPU: bf16 (or int8, int4) on packed weights.

With our kernels a chunk of prefill and a decode step are one call each. Without them, packed oneDNN linears and a few
large operations of torch compute the same on the exact path's cache.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.config import BLOCK
from smolvlm_fms.engine.packed import kernel_text, pack_llava_tower, pack_text, pack_tower
from smolvlm_fms.engine.runner import ModelRunner, Rows, embed_prompt
from smolvlm_fms.engine.sampler import sample
from smolvlm_fms.engine.sequence import Picture, Sampled, Sequence
from smolvlm_fms.engine.torch_text import TorchText
from smolvlm_fms.engine.tower import PackedLlavaTower, PackedTower
from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.model.llava_next import LlavaNext
from smolvlm_fms.model.packing import patch_mask
from smolvlm_fms.model.smolvlm import SmolVLM

__all__ = ["QUANTIZED", "CpuRunner", "FallbackRunner", "pack_model", "suits"]

QUANTIZED: dict[str | None, tuple[str, str]] = {
    None: ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
}
"""Kinds of the text model's blocks and of its head, by what the caller asks for."""

SMALL = 2**20
"""Numbers in a matrix that is copied without a second thought: a tower's table of positions."""


def suits(model: Any) -> bool:
    """Whether the packed path can compute this model as it is: bf16 on the CPU, SwiGLU text, whole linears."""
    weight = model.text_model.base_model.dec_norm.weight
    config = model.config
    return bool(
        isinstance(model, SmolVLM | LlavaNext)
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and config.text.hidden_act == "silu"
        and config.linear_config is None
        and not config.text.head_dim % 2
        and not config.vision.head_dim % 2
        and max(config.text.head_dim, config.vision.head_dim) <= 256
    )


def pack_model(model: SmolVLM | LlavaNext, quantize: str | None = None, quantize_tower: str | None = None) -> None:
    """Pack a model's linears in place. ``quantize``: None, ``"int8"`` or ``"int4"`` for the text model; the head keeps
    eight bits. ``quantize_tower``: None or ``"int8"`` (8-bit weights and activations)."""
    if quantize not in QUANTIZED:
        raise ConfigurationError(f"quantize is {quantize!r}; it is None, 'int8' or 'int4'.")
    if quantize_tower not in (None, "int8"):
        raise ConfigurationError(f"quantize_tower is {quantize_tower!r}; it is None or 'int8'.")
    _leave_the_file(model)
    pack_text(model.text_model, *QUANTIZED[quantize])
    kind = "bf16" if quantize_tower is None else "int8_channel"
    if isinstance(model, LlavaNext):
        pack_llava_tower(model.vision_tower, model.projector, model.config.feature_layers, kind)
    else:
        pack_tower(model.vision_tower, model.connector, kind)


def _leave_the_file(model: Any) -> None:
    """Copy what will not be packed (norms, biases, tables) out of the checkpoint's mappings, one a layer. A mapping
    lasts as long as any tensor in it, and all pages that packing reads would stay resident with it: the weights a
    second time. Linears behind the deepest tap are never read and stay; so does a table that the head will hold."""
    table = None if model.text_model.tied else getattr(model.text_model.base_model.embedding, "weight", None)
    to_pack = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    for parameter in model.parameters():
        small = parameter.dim() < 2 or (parameter.numel() <= SMALL and id(parameter) not in to_pack)
        if small or parameter is table:
            parameter.data = parameter.data.clone()


def _tower(model: SmolVLM | LlavaNext) -> Any:
    if isinstance(model, LlavaNext):
        return PackedLlavaTower(model.vision_tower, model.projector, model.config.feature_layers)
    return PackedTower(model.vision_tower, model.connector)


class _Tower:
    """Encoding, shared by both runners."""

    tower: Any
    model: Any

    @torch.inference_mode()
    def encode(self, picture: Picture, first: int, count: int) -> None:
        """Run tiles through tower and connector."""
        if isinstance(self.model, LlavaNext):
            model, (pixels_NCHW, size) = self.model, picture.resolve()
            picture.add(
                self.tower(pixels_NCHW[first : first + count]), lambda parts: model.join_picture(torch.cat(parts), size)
            )
            return
        pixels_NCHW, mask_NHW = picture.resolve()
        mask = None
        if mask_NHW is not None and not bool(mask_NHW[first : first + count].all()):
            mask = patch_mask(mask_NHW[first : first + count], self.model.config.vision.patch_size)
        picture.add(self.tower(pixels_NCHW[first : first + count], mask), torch.cat)


class FallbackRunner(_Tower, ModelRunner):
    """Without our kernels: the exact path's cache, packed linears of oneDNN, few operations between them."""

    def __init__(self, model: SmolVLM | LlavaNext, kv_tokens: int, banned: SequenceOf[int] = ()) -> None:
        super().__init__(model, kv_tokens, banned)
        self.tower = _tower(model)
        self.text = TorchText(model.text_model)

    def _forward(self, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.text.forward(hidden_BTD, positions_BT, self._cache, rows)


class CpuRunner(_Tower):
    """A Backend on our kernels, for a model that ``pack_model`` has packed."""

    def __init__(self, model: SmolVLM | LlavaNext, kv_tokens: int, banned: SequenceOf[int] = ()) -> None:
        self.model: Any = model.eval()
        self.banned = tuple(banned)
        self.tower = _tower(model)
        self.text = kernel_text(model.text_model)
        self.kv_tokens = kv_tokens // BLOCK * BLOCK
        self.cache = self.text.new_cache(self.kv_tokens)
        self.kv_bytes_per_token = kernels.PackedCache.bytes_per_token(
            len(self.text.layers), self.text.kv_heads, self.text.head_dim
        )

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy keys and values within the cache."""
        self.cache.copy(source, target, tokens)

    def feature_bytes(self, picture: Picture) -> int:
        """Bytes of a picture's features."""
        features: torch.Tensor = picture.features
        return features.numel() * features.element_size()

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, start: int, count: int) -> Sampled | None:
        """Compute a chunk of a prompt; sample after its last token."""
        assert sequence.extent is not None
        last = start + count == len(sequence.prompt)
        hidden_TD = embed_prompt(self.model, sequence, start, count)[0]
        _, logits_V = self.text.prefill(hidden_TD, start, sequence.extent.start, self.cache, logits=last, normed=False)
        return sample(logits_V[None], [sequence], self.banned)[0] if last else None

    @torch.inference_mode()
    def decode(self, sequences: SequenceOf[Sequence]) -> list[Sampled]:
        """One step for sequences at different positions."""
        ids, positions = [s.output[-1] for s in sequences], [s.computed for s in sequences]
        starts = [s.extent.start for s in sequences if s.extent is not None]
        logits_BV, likeliest = self.text.step(ids, positions, starts, self.cache, self.banned)
        return sample(logits_BV, sequences, likeliest=likeliest)
