"""Replaces a model's linears by packed ones, in place: afterwards there is one copy of the weights, the packed one, and
``model(...)`` computes with it, too. For inference on the CPU in bf16; such a model cannot be saved or trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fms.modules.attention import QKV, MultiHeadAttention
from fms.modules.feedforward import FeedForwardBlock, GatedLinearUnit
from torch import Tensor, nn

from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.linears import make_linear
from smolvlm_fms.modules.text import TextModel
from smolvlm_fms.modules.vision import SiglipTower

__all__ = [
    "PackedEmbedding",
    "PackedGLU",
    "PackedMLP",
    "PackedQKV",
    "kernel_blocks",
    "kernel_text",
    "pack_llava_tower",
    "pack_text",
    "pack_tower",
]


COMPACT = {"bf16": "bf16_compact"}


class PackedQKV(nn.Module):
    """Query, key and value in one linear; stands where FMS's QKV modules stand."""

    def __init__(self, qkv: QKV) -> None:
        super().__init__()
        self.splits = [qkv.nheads * qkv.emb_kq_per_head, *[qkv.kvheads * qkv.emb_kq_per_head] * 2]
        parts: list[Any] = [qkv.qkv_fused] if hasattr(qkv, "qkv_fused") else [qkv.query, qkv.key, qkv.value]
        self._parts = parts
        self.linear: nn.Module = nn.Identity()

    def packed(self, kind: str) -> PackedQKV:
        """Pack the weights and let go of the old ones."""
        self.linear = make_linear([p.weight for p in self._parts], [p.bias for p in self._parts], kind=kind)
        self._parts = []
        return self

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, ...]:
        return torch.split(self.linear(q), self.splits, dim=-1)


class PackedMLP(nn.Module):
    """Two linears; the tower's activation is part of the first, where linears know it (``fused``)."""

    def __init__(self, block: FeedForwardBlock, fused: str | None, kind: str) -> None:
        super().__init__()
        self.activation = None if fused else block.a
        self.up = make_linear(block.w1.weight, block.w1.bias, kind=kind, activation=fused or "none")
        self.down = make_linear(block.w2.weight, block.w2.bias, kind=kind)

    def hidden(self, x: Tensor) -> Tensor:
        """After the activation."""
        y: Tensor = self.up(x)
        return y if self.activation is None else self.activation(y)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.hidden(x))
        return y


class PackedGLU(nn.Module):
    """Gate, up and down projection; SwiGLU is part of the first linear."""

    def __init__(self, block: GatedLinearUnit, kind: str) -> None:
        super().__init__()
        parts: list[Any] = [block.wg1_fused] if block.fused else [block.wg, block.w1]
        self.gate_up = make_linear([p.weight for p in parts], [p.bias for p in parts], kind=kind, activation="swiglu")
        self.down = make_linear(block.w2.weight, block.w2.bias, kind=kind)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate_up(x))
        return y


class PackedEmbedding(nn.Module):
    """Token embeddings read out of a packed head that is tied to them."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self._head = [head]  # in a list: the head is registered once, where it belongs

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self._head[0].rows(ids)
        return rows


def pack_blocks(tower: SiglipTower, kind: str = "bf16", depth: int | None = None) -> None:
    """Pack a tower's first ``depth`` blocks (None: all)."""
    fused = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}.get(tower.config.hidden_act)
    blocks: list[Any] = list(tower.layers[:depth])
    for block in blocks:
        _pack_attention(block.attn, kind)
        block.mlp = PackedMLP(block.mlp, fused, kind)


def pack_tower(tower: SiglipTower, connector: Any, kind: str = "bf16") -> None:
    """Pack SmolVLM's tower, and the connector's projection (always bf16)."""
    pack_blocks(tower, kind)
    connector.proj = make_linear(connector.proj.weight, connector.proj.bias)


def pack_llava_tower(tower: SiglipTower, projector: Any, layers: Sequence[int], kind: str = "bf16") -> None:
    """Pack the blocks of LLaVA-Next's tower up to the deepest tap, and the projector (always bf16). The blocks behind
    are never run: they stay in the checkpoint's file."""
    pack_blocks(tower, kind, max(layer if layer >= 0 else len(tower.layers) + 1 + layer for layer in layers))
    for name in ("linear_1", "linear_2"):
        linear = getattr(projector, name)
        setattr(projector, name, make_linear(linear.weight, linear.bias))


def pack_text(text: TextModel, kind: str = "bf16", head_kind: str = "bf16") -> None:
    """Pack the blocks of a text model (whose activation must be SiLU) and its head: bf16 in the compact form where
    kernels unpack it on the way, because decoding is bound by the memory that it moves."""
    if kernels.available() and kernels.isa() == "avx512":
        kind, head_kind = (COMPACT.get(one, one) for one in (kind, head_kind))
    for block in text.base_model.layers:
        _pack_attention(block.attn, kind)
        block.ff_sub_layer = PackedGLU(block.ff_sub_layer, kind)
    text.head = make_linear(text.head.weight, None, kind=head_kind)
    if text.tied:
        text.base_model.embedding = PackedEmbedding(text.head)


def _pack_attention(attention: MultiHeadAttention, kind: str) -> None:
    attention.in_proj = PackedQKV(attention.in_proj).packed(kind)
    attention.dense = make_linear(attention.dense.weight, attention.dense.bias, kind=kind)


def kernel_blocks(tower: SiglipTower, depth: int) -> kernels.PackedBlocks | None:
    """The kernels' view of a tower's first ``depth`` packed blocks; None where they do not know its activation."""
    blocks: list[Any] = list(tower.layers[:depth])
    if not blocks or any(block.mlp.activation is not None for block in blocks):
        return None
    layers = [
        kernels.TowerLayer(
            qkv=block.attn.in_proj.linear,
            out=block.attn.dense,
            up=block.mlp.up,
            down=block.mlp.down,
            attention_norm=(block.ln1.weight, block.ln1.bias),
            mlp_norm=(block.ln2.weight, block.ln2.bias),
        )
        for block in blocks
    ]
    config = tower.config
    return kernels.PackedBlocks(
        layers, heads=config.num_attention_heads, head_dim=config.head_dim, eps=config.layer_norm_eps
    )


def kernel_text(text: TextModel) -> kernels.PackedText:
    """The kernels' view of a text model that ``pack_text`` has packed; it shares the weights."""
    config = text.config
    assert config.num_key_value_heads is not None and config.head_dim is not None
    layers: list[Any] = list(text.base_model.layers)
    rope = text.base_model.rot_emb.rope_scaling
    cos, sin = kernels.rope_tables(rope.compute_scaled_freqs(torch.device("cpu"), 1), config.max_position_embeddings)
    return kernels.PackedText(
        [
            kernels.PackedLayer(
                qkv=block.attn.in_proj.linear,
                out=block.attn.dense,
                gate_up=block.ff_sub_layer.gate_up,
                down=block.ff_sub_layer.down,
                attention_norm=block.ln.weight,
                mlp_norm=block.ff_ln.weight,
            )
            for block in layers
        ],
        text.base_model.dec_norm.weight,
        text.head,
        embeddings=None if text.tied else text.base_model.embedding.weight,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        cos=cos,
        sin=sin,
        eps=config.rms_norm_eps,
        attention_scale=config.attention_scale,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logits_scale=1.0 / text.logits_divisor,
    )
