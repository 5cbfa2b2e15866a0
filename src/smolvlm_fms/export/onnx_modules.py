"""The three graphs of an ONNX export as plain modules: nothing but matrix products, norms and softmax in them.

    pixel_values, pixel_attention_mask ─▶ VisionEncoder ─▶ image_features
    input_ids ─▶ Embedding ─▶ inputs_embeds                (image_features take the <image> rows)
    inputs_embeds, attention_mask, position_ids, past ─▶ Decoder ─▶ logits, present

They hold the model's own tensors in Hugging Face's layout, so a cache's keys are those of any other implementation.
FMS's modules keep RoPE tables in dictionaries by device and choose operators by name, which torch.export cannot follow.

Legend: B batch, N tiles, M tiles of all rows, P patches, T new tokens, S all tokens, D width, H heads, G key heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolvlm_fms.export.gguf import rope_factors
from smolvlm_fms.modules.activation import activation
from smolvlm_fms.modules.connector import pixel_unshuffle
from smolvlm_fms.modules.vision import position_ids

__all__ = ["Decoder", "Embedding", "VisionEncoder"]

State = Mapping[str, Tensor]
"""A checkpoint's tensors under Hugging Face's names."""


def _linear(state: State, name: str) -> nn.Linear:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _norm(state: State, name: str, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(state[f"{name}.weight"]), eps=eps, device="meta")
    norm.weight = nn.Parameter(state[f"{name}.weight"], requires_grad=False)
    norm.bias = nn.Parameter(state[f"{name}.bias"], requires_grad=False)
    return norm


def _by_head(x_BTD: Tensor, width: int) -> Tensor:
    """(B, T, H * width) to (B, H, T, width)."""
    return x_BTD.reshape(*x_BTD.shape[:2], -1, width).transpose(1, 2)


class _RMSNorm(nn.Module):
    def __init__(self, state: State, name: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(state[f"{name}.weight"], requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _VisionBlock(nn.Module):
    def __init__(self, state: State, name: str, config: Any) -> None:
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.norms = nn.ModuleList(_norm(state, f"{name}.layer_norm{i}", config.layer_norm_eps) for i in (1, 2))
        self.qkv = nn.ModuleList(_linear(state, f"{name}.self_attn.{part}_proj") for part in "qkv")
        self.out = _linear(state, f"{name}.self_attn.out_proj")
        self.up, self.down = _linear(state, f"{name}.mlp.fc1"), _linear(state, f"{name}.mlp.fc2")
        self.activation = activation(config.hidden_act)

    def forward(self, hidden_MPD: Tensor, hidden_keys_M11P: Tensor) -> Tensor:
        normed = self.norms[0](hidden_MPD)
        query, key, value = (_by_head(part(normed), self.width) for part in self.qkv)
        scores = query @ key.transpose(-1, -2) * self.width**-0.5 + hidden_keys_M11P
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden_MPD = hidden_MPD + self.out(attended)
        changed: Tensor = hidden_MPD + self.down(self.activation(self.up(self.norms[1](hidden_MPD))))
        return changed


class VisionEncoder(nn.Module):
    """Tower and connector: pixels (B, N, C, H, W) and their mask (B, N, H, W), bool, to (M, tokens per tile, D)."""

    def __init__(self, state: State, config: Any) -> None:
        super().__init__()
        vision, name = config.vision, "model.vision_model"
        self.patch, self.side, self.factor = vision.patch_size, vision.patches_per_side, config.scale_factor
        self.weight = nn.Parameter(state[f"{name}.embeddings.patch_embedding.weight"], requires_grad=False)
        self.bias = nn.Parameter(state[f"{name}.embeddings.patch_embedding.bias"], requires_grad=False)
        self.positions = nn.Parameter(state[f"{name}.embeddings.position_embedding.weight"], requires_grad=False)
        layers = range(vision.num_hidden_layers)
        self.blocks = nn.ModuleList(_VisionBlock(state, f"{name}.encoder.layers.{i}", vision) for i in layers)
        self.norm = _norm(state, f"{name}.post_layernorm", vision.layer_norm_eps)
        self.proj = _linear(state, "model.connector.modality_projection.proj")

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        pixels_NCHW = pixel_values.flatten(0, 1)
        mask_NHW, covered = pixel_attention_mask.flatten(0, 1), self.side * self.patch
        whole = mask_NHW[:, :covered, :covered].reshape(-1, self.side, self.patch, self.side, self.patch)
        patches_NHW = whole.any(4).any(2)
        real_N = patches_NHW.flatten(1).any(1)
        # A padding tile sees itself, which keeps NaN out; its features are left out below.
        seen_NHW = patches_NHW | ~real_N[:, None, None]
        hidden = F.conv2d(pixels_NCHW, self.weight, self.bias, stride=self.patch).flatten(2).transpose(1, 2)
        hidden = hidden + self.positions[position_ids(seen_NHW, self.side)]
        hidden_keys = torch.where(seen_NHW.flatten(1), 0.0, -torch.inf)[:, None, None, :].to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, hidden_keys)
        tokens_NTD: Tensor = self.proj(pixel_unshuffle(self.norm(hidden), self.factor))
        return tokens_NTD[real_N]


class Embedding(nn.Module):
    """Token ids (B, T) to embeddings (B, T, D)."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.weight = nn.Parameter(state["model.text_model.embed_tokens.weight"], requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight)


class _TextBlock(nn.Module):
    def __init__(self, state: State, name: str, config: Any) -> None:
        super().__init__()
        self.config = config
        self.norm = _RMSNorm(state, f"{name}.input_layernorm", config.rms_norm_eps)
        self.mlp_norm = _RMSNorm(state, f"{name}.post_attention_layernorm", config.rms_norm_eps)
        self.qkv = nn.ModuleList(_linear(state, f"{name}.self_attn.{part}_proj") for part in "qkv")
        self.out = _linear(state, f"{name}.self_attn.o_proj")
        self.gate, self.up, self.down = (_linear(state, f"{name}.mlp.{part}_proj") for part in ("gate", "up", "down"))
        self.activation = activation(config.hidden_act)

    def forward(
        self, hidden_BTD: Tensor, cos: Tensor, sin: Tensor, bias_B1TS: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        c = self.config
        normed = self.norm(hidden_BTD)
        query, key, value = (_by_head(part(normed), c.head_dim) for part in self.qkv)
        key = torch.cat((past[0], _rotated(key, cos, sin)), 2)
        value = torch.cat((past[1], value), 2)
        shared = c.num_attention_heads // c.num_key_value_heads
        turned = _rotated(query, cos, sin)  # heads that share keys stand together: (B, G, H / G, T, C)
        query = turned.reshape(turned.shape[0], c.num_key_value_heads, shared, -1, c.head_dim)
        scores = query @ key[:, :, None].transpose(-1, -2) * c.attention_scale + bias_B1TS[:, :, None]
        attended = (scores.softmax(-1) @ value[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)
        hidden_BTD = hidden_BTD + self.out(attended) * c.residual_multiplier
        normed = self.mlp_norm(hidden_BTD)
        grown = self.down(self.activation(self.gate(normed)) * self.up(normed))
        return hidden_BTD + grown * c.residual_multiplier, (key, value)


def _rotated(x_BHTC: Tensor, cos_B1TC: Tensor, sin_B1TC: Tensor) -> Tensor:
    """RoPE in Hugging Face's order: channel i turns with channel i + C/2."""
    first, second = x_BHTC.chunk(2, -1)
    return torch.cat((first * cos_B1TC - second * sin_B1TC, second * cos_B1TC + first * sin_B1TC), -1)


class Decoder(nn.Module):
    """Embeddings (B, T, D) behind a cache of past tokens to logits (B, T, V) and the longer cache.

    attention_mask (B, past + T): 1 for real tokens. position_ids (B, T). past: per layer keys and values
    (B, G, past, head_dim), rotated; past may be 0.
    """

    frequencies: Tensor

    def __init__(self, state: State, config: Any) -> None:
        super().__init__()
        self.config = text = config.text
        layers = range(text.num_hidden_layers)
        self.blocks = nn.ModuleList(_TextBlock(state, f"model.text_model.layers.{i}", text) for i in layers)
        self.norm = _RMSNorm(state, "model.text_model.norm", text.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.head = nn.Parameter(
            state["model.text_model.embed_tokens.weight" if tied else "lm_head.weight"], requires_grad=False
        )
        frequencies = text.rope_theta ** -(torch.arange(0, text.head_dim, 2, dtype=torch.float64) / text.head_dim)
        factors = rope_factors(text)
        self.register_buffer("frequencies", (frequencies if factors is None else frequencies / factors).float())

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        hidden = inputs_embeds * self.config.embedding_multiplier
        angles = position_ids[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        length, total = hidden.shape[1], past[0][0].shape[2] + hidden.shape[1]
        keys = torch.arange(total)
        queries = torch.arange(length)[:, None] + (total - length)
        # A padding query sees itself and nothing else, so that its softmax is defined.
        seen_BTS = ((keys <= queries) & (attention_mask[:, None, :] > 0)) | (keys == queries)
        bias_B1TS = torch.where(seen_BTS, 0.0, -torch.inf)[:, None].to(hidden.dtype)
        present = []
        for block, one in zip(self.blocks, past, strict=True):
            hidden, grown = block(hidden, cos, sin, bias_B1TS, one)
            present.append(grown)
        return F.linear(self.norm(hidden), self.head), present
