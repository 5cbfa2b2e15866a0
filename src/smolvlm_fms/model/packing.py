"""Putting image features where the ``<image>`` placeholders are; every row's counts are checked before that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolvlm_fms.errors import TokenCountError

__all__ = ["check_counts", "count_tiles", "pack", "patch_mask"]


def pack(
    embeddings_BTD: Tensor,
    input_ids_BT: Tensor,
    features_MTD: Tensor,
    image_token_id: int,
    tiles_per_row: Sequence[int] | None = None,
) -> Tensor:
    """Return ``embeddings_BTD`` (B, T, D) with image features at the placeholders, in order.

    ``features_MTD`` (M, tokens per tile, D) holds the tiles of row 0, then those of row 1, and so on; it is cast to
    the embeddings' dtype. With ``tiles_per_row`` every row's count is checked; raises TokenCountError.
    """
    mask_BT = input_ids_BT == image_token_id
    if tiles_per_row is not None and not torch.compiler.is_compiling():
        check_counts(mask_BT.sum(1).tolist(), tiles_per_row, features_MTD.shape[1])
    features = features_MTD.to(embeddings_BTD.device, embeddings_BTD.dtype)
    return embeddings_BTD.masked_scatter(mask_BT[..., None], features)


def check_counts(placeholders: Sequence[int], tiles_per_row: Sequence[int], tokens_per_tile: int) -> None:
    """Raise TokenCountError for the first row whose placeholders and features differ in number."""
    for row, (wanted, tiles) in enumerate(zip(placeholders, tiles_per_row, strict=True)):
        given = tiles * tokens_per_tile
        if wanted == given:
            continue
        if wanted < given:
            first = wanted // tokens_per_tile
            cause = "was the text cut (truncation, max_length), or were pictures added without their placeholders?"
        else:
            first = tiles
            cause = "was the prompt made for other pictures, or with another image_seq_len or tile grid?"
        raise TokenCountError(
            f"Row {row}: the text has {wanted} <image> placeholders, but the row's {tiles} tiles give {given} image "
            f"features ({tiles} × {tokens_per_tile}); they part at tile {first}. Likely cause: {cause}"
        )


def count_tiles(pixels_BNCHW: Tensor, mask_BNHW: Tensor | None, placeholders: Sequence[int], tokens: int) -> Tensor:
    """Return which of the (B, N) tiles are real, bool.

    The processors mark padding tiles in ``pixel_attention_mask``. Without one, a row's placeholders say how many of
    its tiles are meant, and whatever comes after them must be blank, or the row's counts do not fit. A black
    tile is never mistaken for padding.
    """
    if mask_BNHW is not None:
        return mask_BNHW.flatten(2).any(-1)
    meant = torch.tensor([-(-count // tokens) for count in placeholders], device=pixels_BNCHW.device)
    real_BN = torch.arange(pixels_BNCHW.shape[1], device=pixels_BNCHW.device) < meant[:, None]
    return real_BN | pixels_BNCHW.flatten(2).any(-1)


def patch_mask(mask_NHW: Tensor, patch_size: int) -> Tensor:
    """Pixel mask (N, H, W) to patch mask (N, H // patch, W // patch): a patch with one real pixel is real."""
    blocks = mask_NHW.bool().unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    return blocks.flatten(3).any(-1)
