"""Cross entropy on the tokens that are learnt, and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvlm_fms.training.samples import IGNORE

__all__ = ["shifted_targets", "token_loss"]


def shifted_targets(labels_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
    """What each position (B, T) is to predict: the next token's label, IGNORE at the end.

    In packed rows the last token of a sample does not predict the first one of the next.
    """
    targets_BT = torch.full_like(labels_BT, IGNORE)
    targets_BT[:, :-1] = labels_BT[:, 1:]
    if segments_BT is not None:
        targets_BT[:, :-1].masked_fill_(segments_BT[:, 1:] != segments_BT[:, :-1], IGNORE)
    return targets_BT


def token_loss(logits_KV: Tensor, targets_K: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return what to minimise and the cross entropy alone, both summed over the K target tokens, in float32.

    z_loss adds ``z_loss · (log Z)²`` a token, which keeps logits from drifting (PaLM, arXiv 2204.02311).
    """
    logits_KV = logits_KV.float()
    entropy = F.cross_entropy(logits_KV, targets_K, reduction="sum")
    if not z_loss:
        return entropy, entropy.detach()
    return entropy + z_loss * logits_KV.logsumexp(-1).square().sum(), entropy.detach()
