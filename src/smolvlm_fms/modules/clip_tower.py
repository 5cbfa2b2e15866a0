"""CLIP's vision tower (arXiv 2103.00020), for LLaVA-1.6: SigLIP's blocks behind a class token and a norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from smolvlm_fms.config import VisionConfig
from smolvlm_fms.errors import InputError
from smolvlm_fms.modules.vision import SiglipEmbeddings, SiglipTower

__all__ = ["ClipTower"]


class ClipEmbeddings(SiglipEmbeddings):
    """Class token, patch projection without a bias, learnt positions, norm: pixels (N, C, H, W) to (N, 1 + P, D)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.patches_per_side**2 + 1, width)
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels_NCHW: Tensor, patch_mask_NHW: Tensor | None) -> Tensor:
        size = self.config.image_size
        if patch_mask_NHW is not None or pixels_NCHW.shape[2:] != (size, size):
            raise InputError(
                f"A CLIP tower takes whole tiles of {size} × {size} pixels; {tuple(pixels_NCHW.shape)} came"
                + ("." if patch_mask_NHW is None else " with a patch mask.")
            )
        patches_NPD = self.patch_embedding(pixels_NCHW).flatten(2).transpose(1, 2)
        token_N1D = self.class_embedding.expand(len(patches_NPD), 1, -1)
        hidden_NPD: Tensor = torch.cat((token_N1D, patches_NPD), 1) + self.position_embedding.weight
        normed_NPD: Tensor = self.pre_layernorm(hidden_NPD)
        return normed_NPD

    def reset_parameters(self) -> None:
        width, fan_in = self.config.hidden_size, self.patch_embedding.weight[0].numel()
        nn.init.normal_(self.class_embedding, std=1 / math.sqrt(width))
        nn.init.normal_(self.position_embedding.weight, std=1 / math.sqrt(width))
        nn.init.trunc_normal_(self.patch_embedding.weight, std=1 / math.sqrt(fan_in))
        self.pre_layernorm.reset_parameters()


class ClipTower(SiglipTower):
    """Vision tower: pixels (N, C, H, W) to features (N, 1 + P, D), the class token's first.

    CLIP norms the class token alone after the last block, and LLaVA does not read that token; ``post_layernorm`` is
    there because checkpoints hold it.
    """

    def __init__(self, config: VisionConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.embeddings = ClipEmbeddings(config)
