"""The SigLIP-shaped vision tower of SmolVLM and Idefics3 (arXiv 2303.15343, with NaViT's positions, 2307.06304)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.utils.checkpoint
from fms.modules.attention import MultiHeadAttention
from fms.modules.feedforward import FeedForwardBlock
from torch import Tensor, nn

from smolvlm_fms.config import VisionConfig
from smolvlm_fms.modules.activation import activation
from smolvlm_fms.modules.attention import PLAIN

__all__ = ["SiglipTower", "position_ids"]


@functools.lru_cache(maxsize=64)
def _axis_buckets(count: int, side: int) -> tuple[int, ...]:
    """Buckets 0…side−1 of ``count`` evenly spaced patches: floor(i * side / count), in integers.

    transformers compares i/count with multiples of 1/side in floating point, which in some releases runs in the
    pixels' dtype and then moves the last row and column. A ratio of integers is computed as one here.
    """
    return tuple(i * side // count for i in range(count))


def position_ids(mask_NHW: Tensor, side: int) -> Tensor:
    """Return the position ids (N, H*W), int64, of tiles whose real patches are ``mask_NHW`` (N, H, W), bool.

    A full tile has ids 0…H*W−1. A tile that covers h by w patches of its canvas spreads them over the ``side`` by
    ``side`` table of learnt positions. Padding patches get id 0. Runs in integers without synchronising.
    """
    _, height, width = mask_NHW.shape
    rows_N1 = mask_NHW[:, :, 0].sum(1, keepdim=True).clamp(min=1)
    cols_N1 = mask_NHW[:, 0, :].sum(1, keepdim=True).clamp(min=1)
    row_NH = torch.arange(height, device=mask_NHW.device) * side // rows_N1
    col_NW = torch.arange(width, device=mask_NHW.device) * side // cols_N1
    ids_NHW = row_NH.clamp(max=side - 1)[:, :, None] * side + col_NW.clamp(max=side - 1)[:, None, :]
    return torch.where(mask_NHW, ids_NHW, 0).flatten(1)


class SiglipEmbeddings(nn.Module):
    """Patch projection plus learnt positions: pixels (N, C, H, W) to hidden states (N, P, D)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        # nn.Embedding(…) would draw normal numbers; for a model without memory that imports half of torch's compiler.
        table = torch.empty(config.patches_per_side**2, config.hidden_size)
        self.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]

    def forward(self, pixels_NCHW: Tensor, patch_mask_NHW: Tensor | None) -> Tensor:
        hidden_NPD: Tensor = self.patch_embedding(pixels_NCHW).flatten(2).transpose(1, 2)
        side = self.config.patches_per_side
        height, width = (pixels_NCHW.shape[i] // self.config.patch_size for i in (2, 3))
        positions: Tensor
        if patch_mask_NHW is not None:
            positions = self.position_embedding(position_ids(patch_mask_NHW, side))
        elif (height, width) == (side, side):
            positions = self.position_embedding.weight
        else:
            rows = torch.tensor(_axis_buckets(height, side), device=hidden_NPD.device)
            cols = torch.tensor(_axis_buckets(width, side), device=hidden_NPD.device)
            positions = self.position_embedding((rows[:, None] * side + cols).flatten())
        return hidden_NPD + positions

    def reset_parameters(self) -> None:
        width, fan_in = self.config.hidden_size, self.patch_embedding.weight[0].numel()
        nn.init.normal_(self.position_embedding.weight, std=1 / math.sqrt(width))
        nn.init.trunc_normal_(self.patch_embedding.weight, std=1 / math.sqrt(fan_in))
        assert self.patch_embedding.bias is not None
        nn.init.zeros_(self.patch_embedding.bias)


class SiglipBlock(nn.Module):
    """Pre-norm transformer block: hidden states (N, P, D) to the same shape."""

    def __init__(self, config: VisionConfig, fused: bool, linear_config: dict[str, Any] | None) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        # nn.LayerNorm, not FMS's: that one takes the mean in the input's own precision and loses bits in bf16.
        self.ln1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = MultiHeadAttention(
            width,
            head,
            head,
            config.num_attention_heads,
            config.num_attention_heads,
            p_dropout=config.attention_dropout,
            use_bias=True,
            fused=fused,
            linear_config=linear_config,
            scale_factor=head**-0.5,
        )
        self.ln2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForwardBlock(
            width,
            hidden_grow_factor=grow_factor(width, config.intermediate_size),
            activation_fn=activation(config.hidden_act),
            p_dropout=0.0,
            use_bias=True,
            linear_config=linear_config,
        )

    def forward(self, hidden_NPD: Tensor, mask_N1P: Tensor | None) -> Tensor:
        hidden_NPD = hidden_NPD + self.attn(self.ln1(hidden_NPD), attn_name=PLAIN, mask=mask_N1P)
        mlp_NPD: Tensor = self.mlp(self.ln2(hidden_NPD))
        return hidden_NPD + mlp_NPD

    def reset_parameters(self) -> None:
        for part in (self.ln1, self.attn, self.ln2, self.mlp):
            part.reset_parameters()


class SiglipTower(nn.Module):
    """Vision tower: pixels (N, C, H, W) to patch features (N, P, D), P = (H // patch) * (W // patch).

    pixels_NCHW ─▶ patch projection + positions ─▶ blocks × L ─▶ post-norm ─▶ features_NPD
    """

    def __init__(
        self, config: VisionConfig, *, fused_weights: bool = True, linear_config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = SiglipEmbeddings(config)
        self.layers = nn.ModuleList(
            SiglipBlock(config, fused_weights, linear_config) for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixels_NCHW: Tensor, patch_mask_NHW: Tensor | None = None, output_hidden_states: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Return features (N, P, D) in the tower's dtype, after the post-norm.

        ``patch_mask_NHW`` (N, H // patch, W // patch), bool, marks real patches; None means that all are. With
        ``output_hidden_states`` the second result holds L + 1 tensors (N, P, D): embeddings, then every block's
        output, before the post-norm.
        """
        hidden_NPD = self.embeddings(pixels_NCHW.to(self.dtype), patch_mask_NHW)
        mask_N1P = None if patch_mask_NHW is None else patch_mask_NHW.flatten(1)[:, None, :]
        states = [hidden_NPD]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden_NPD = torch.utils.checkpoint.checkpoint(layer, hidden_NPD, mask_N1P, use_reentrant=False)
            else:
                hidden_NPD = layer(hidden_NPD, mask_N1P)
            if output_hidden_states:
                states.append(hidden_NPD)
        features_NPD: Tensor = self.post_layernorm(hidden_NPD)
        return (features_NPD, tuple(states)) if output_hidden_states else features_NPD

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the tower computes in."""
        return self.post_layernorm.weight.dtype

    def reset_parameters(self) -> None:
        """Initialise as SigLIP does: truncated normal projections, unit norms."""
        self.embeddings.reset_parameters()
        for layer in self.layers:
            assert isinstance(layer, SiglipBlock)
            layer.reset_parameters()
        self.post_layernorm.reset_parameters()


def grow_factor(width: int, hidden: int) -> float:
    """The factor for which FMS's ``int(factor * width)`` is exactly ``hidden`` (plain division can fall one short)."""
    factor = hidden / width
    return factor if int(factor * width) == hidden else math.nextafter(factor, math.inf)
