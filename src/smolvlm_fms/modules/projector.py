"""LLaVA-Next's bridge from tower to text: tapped features, a two-layer projector, tiles put together to a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from smolvlm_fms.modules.activation import activation
from smolvlm_fms.modules.vision import SiglipTower

__all__ = ["LlavaNextProjector", "join_tiles", "tapped_features"]


def tapped_features(
    tower: SiglipTower, pixels_NCHW: Tensor, layers: Sequence[int], *, drop_class_token: bool = False
) -> Tensor:
    """Hidden states of ``tower`` after several of its blocks, side by side: (N, P, D · len(layers)).

    ``layers`` are counted as transformers counts them: 0 is the embeddings, L or −1 the last block's output, before
    the post-norm. Blocks behind the deepest tap are not run.
    """
    total = len(tower.layers)
    taps = [layer if layer >= 0 else total + 1 + layer for layer in layers]
    hidden_NPD = tower.embeddings(pixels_NCHW.to(tower.dtype), None)
    states = {0: hidden_NPD}
    for index, block in enumerate(tower.layers[: max(taps)], start=1):
        if tower.gradient_checkpointing and tower.training:
            hidden_NPD = torch.utils.checkpoint.checkpoint(block, hidden_NPD, None, use_reentrant=False)
        else:
            hidden_NPD = block(hidden_NPD, None)
        if index in taps:
            states[index] = hidden_NPD
    features_NPD = states[taps[0]] if len(taps) == 1 else torch.cat([states[tap] for tap in taps], -1)
    return features_NPD[:, 1:] if drop_class_token else features_NPD


def join_tiles(tiles_NPD: Tensor, newline_D: Tensor, grid: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Put the projected tiles of one picture together: (1 + rows · cols, P, D) to image tokens (T, D).

    First the overview's P tokens. Then the grid of the other tiles, read line by line across tiles, less ``padding``
    (patches at top and bottom, at left and right), with ``newline_D`` after each line. P must be a square number.
    """
    (rows, cols), (top, left) = grid, padding
    count, patches, width = tiles_NPD.shape
    assert count == 1 + rows * cols, f"{count} tiles do not make an overview and a grid of {rows} × {cols}."
    side = round(patches**0.5)
    lines = tiles_NPD[1:].view(rows, cols, side, side, width).transpose(1, 2)
    lines = lines.reshape(rows * side, cols * side, width)[top : rows * side - top, left : cols * side - left]
    newlines = newline_D.to(lines.dtype).expand(len(lines), 1, width)
    return torch.cat((tiles_NPD[0], torch.cat((lines, newlines), 1).flatten(0, 1)))


class LlavaNextProjector(nn.Module):
    """Tapped features (N, P, D_vision · taps) to image tokens (N, P, D_text)."""

    def __init__(self, features: int, text_width: int, hidden_act: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, text_width, bias=bias)
        self.act = activation(hidden_act)
        self.linear_2 = nn.Linear(text_width, text_width, bias=bias)

    def forward(self, features_NPD: Tensor) -> Tensor:
        tokens_NPD: Tensor = self.linear_2(self.act(self.linear_1(features_NPD)))
        return tokens_NPD

    def reset_parameters(self) -> None:
        for linear in (self.linear_1, self.linear_2):
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
