"""Encoding the tiles of large pictures. The seeds call a tile a *patch* here; the public names keep that word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvlm_fms.errors import ConfigurationError, InputError

__all__ = ["MultiPatchVisionProcessor", "PatchStatistics", "create_multi_patch_processor"]


@dataclass(frozen=True)
class PatchStatistics:
    """What one ``process_patches`` call did: counts, and the size of what came out."""

    batch_size: int
    num_patches: int
    tokens_per_patch: int
    total_tokens: int
    embedding_dim: int
    encoder_calls: int


class MultiPatchVisionProcessor:
    """Runs each 'patch' (tile) of a picture through tower and connector and joins the image tokens.

        patches (B, N, C, H, W) ─▶ tower (B·N, P, D_v) ─▶ connector (B·N, tokens, D) ─▶ (B, N·tokens, D)

    ``SmolVLM.forward`` encodes its tiles with this class and nothing else.
    """

    def __init__(
        self,
        vision_encoder: Callable[..., Tensor],
        connector: Callable[[Tensor], Tensor],
        tokens_per_patch: int,
        *,
        patches_per_call: int | None = None,
    ) -> None:
        """``patches_per_call`` bounds how many tiles go through the tower at once (None: all), and so its memory."""
        for name, value in (("tokens_per_patch", tokens_per_patch), ("patches_per_call", patches_per_call)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1; it is {value}.")
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.tokens_per_patch = tokens_per_patch
        self.patches_per_call = patches_per_call

    def process_patches(
        self, patches: Tensor, patch_attention_mask: Tensor | None = None
    ) -> tuple[Tensor, PatchStatistics]:
        """Return embeddings (B, N·tokens, D), in the connector's dtype, and statistics.

        ``patches`` (B, N, C, H, W), floating point, N ≥ 1. ``patch_attention_mask`` (B, N, H / p, W / p), bool,
        marks the real patches of padded tiles; None means all. Raises InputError for other shapes, or when the
        connector gives another number of tokens than ``tokens_per_patch``.
        """
        if patches.dim() != 5 or not patches.is_floating_point() or 0 in patches.shape:
            raise InputError(
                f"patches must be a floating-point tensor (batch, patches, channels, height, width), none of them 0; "
                f"{tuple(patches.shape)} {patches.dtype} came."
            )
        batch, count = patches.shape[:2]
        if patch_attention_mask is not None and patch_attention_mask.shape[:2] != (batch, count):
            raise InputError(
                f"patch_attention_mask {tuple(patch_attention_mask.shape)} does not fit {batch} × {count} patches."
            )
        tiles_NCHW = patches.flatten(0, 1)
        masks_NHW = None if patch_attention_mask is None else patch_attention_mask.flatten(0, 1)
        step = self.patches_per_call or len(tiles_NCHW)
        parts = []
        for start in range(0, len(tiles_NCHW), step):
            mask = None if masks_NHW is None else masks_NHW[start : start + step]
            parts.append(self.connector(self.vision_encoder(tiles_NCHW[start : start + step], mask)))
        tokens_NTD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tokens_NTD.shape[1] != self.tokens_per_patch:
            raise InputError(
                f"A patch of {patches.shape[3]}×{patches.shape[4]} pixels became {tokens_NTD.shape[1]} tokens, not "
                f"{self.tokens_per_patch}; patches must have the size that the configuration names."
            )
        embeddings = tokens_NTD.reshape(batch, count * self.tokens_per_patch, -1)
        statistics = PatchStatistics(
            batch_size=batch,
            num_patches=count,
            tokens_per_patch=self.tokens_per_patch,
            total_tokens=count * self.tokens_per_patch,
            embedding_dim=embeddings.shape[-1],
            encoder_calls=len(parts),
        )
        return embeddings, statistics


def create_multi_patch_processor(
    vision_encoder: Callable[..., Tensor],
    connector: Callable[[Tensor], Tensor],
    tokens_per_patch: int,
    *,
    patches_per_call: int | None = None,
) -> MultiPatchVisionProcessor:
    """Build a MultiPatchVisionProcessor; for a SmolVLM ``model`` use ``model.multi_patch``, which is one."""
    return MultiPatchVisionProcessor(vision_encoder, connector, tokens_per_patch, patches_per_call=patches_per_call)
