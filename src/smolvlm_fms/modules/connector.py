"""The bridge from patch features to text embeddings: pixel unshuffle (space to depth), then one projection."""

from __future__ import annotations

import math

from torch import Tensor, nn

from smolvlm_fms.errors import InputError

__all__ = ["Idefics3Connector", "pixel_unshuffle"]


def pixel_unshuffle(features_NPD: Tensor, factor: int) -> Tensor:
    """Fold each ``factor`` by ``factor`` block of patches into one token: (N, P, D) to (N, P / f², D * f²).

    P must be a square number whose root ``factor`` divides. Within a token the block's rows come first, then its
    columns, then D: the order that Idefics3's checkpoints were trained with.
    """
    count, patches, width = features_NPD.shape
    side = math.isqrt(patches)
    if side * side != patches or side % factor:
        raise InputError(
            f"Pixel unshuffle by {factor} needs a square grid whose side it divides; {patches} patches came."
        )
    out = side // factor
    blocks = features_NPD.view(count, out, factor, out, factor, width).transpose(2, 3)
    return blocks.reshape(count, out * out, factor * factor * width)


class Idefics3Connector(nn.Module):
    """Patch features (N, P, D_vision) to image tokens (N, P / f², D_text)."""

    def __init__(self, vision_width: int, text_width: int, scale_factor: int) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.proj = nn.Linear(vision_width * scale_factor**2, text_width, bias=False)

    def forward(self, features_NPD: Tensor) -> Tensor:
        tokens_NTD: Tensor = self.proj(pixel_unshuffle(features_NPD, self.scale_factor))
        return tokens_NTD

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.in_features**-0.5)
