"""The CPU kernels as torch functions: tensors in, tensors out. Inference only: nothing here has a backward.

Every function is a ``torch.library`` operator of the namespace ``smolvlm_fms`` with a fake implementation. All work in
bf16 with fp32 sums, on the number of threads that torch uses. B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smolvlm_fms.engine.kernels import loader
from smolvlm_fms.engine.kernels.registry import operator, require_bf16
from smolvlm_fms.errors import InputError


def _vision_attention(qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    qkv = qkv.contiguous()
    batch, tokens, _, heads, d = qkv.shape
    mask = None if key_mask is None else key_mask.to(torch.bool).contiguous()
    out = torch.empty((batch, tokens, heads * d), dtype=torch.bfloat16)
    if not out.numel():
        return out
    args = loader.VisionAttentionArgs(
        qkv=qkv.data_ptr(),
        key_mask=loader.pointer(mask),
        out=out.data_ptr(),
        batch=batch,
        tokens=tokens,
        heads=heads,
        d=d,
        scale=scale,
        threads=torch.get_num_threads(),
    )
    loader.check(loader.library().svk_vision_attention(args), "vision_attention")
    return out


def _vision_attention_fake(qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    batch, tokens, _, heads, d = qkv.shape
    return qkv.new_empty((batch, tokens, heads * d))


operator(
    "vision_attention(Tensor qkv, Tensor? key_mask, float scale) -> Tensor", _vision_attention, _vision_attention_fake
)


def vision_attention(qkv_BT3HD: Tensor, key_mask_BT: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Bidirectional attention: packed queries, keys and values (B, T, 3, H, D) bf16 -> (B, T, H*D) bf16.

    D is even, at most 256. ``key_mask_BT`` (bool) is False for keys that nobody sees; a row without any key answers
    zeros. ``scale`` is 1/sqrt(D) by default.

    Raises: InputError for another dtype, device or shape.
    """
    require_bf16("qkv", qkv_BT3HD)
    if qkv_BT3HD.dim() != 5 or qkv_BT3HD.shape[2] != 3 or qkv_BT3HD.shape[4] % 2 or not 0 < qkv_BT3HD.shape[4] <= 256:
        raise InputError(f"qkv must be (B, T, 3, H, D) with an even D up to 256; got {tuple(qkv_BT3HD.shape)}")
    if key_mask_BT is not None and key_mask_BT.shape != qkv_BT3HD.shape[:2]:
        raise InputError(f"the mask must be {tuple(qkv_BT3HD.shape[:2])}; got {tuple(key_mask_BT.shape)}")
    scale = 1.0 / math.sqrt(qkv_BT3HD.shape[4]) if scale is None else scale
    out: Tensor = torch.ops.smolvlm_fms.vision_attention(qkv_BT3HD, key_mask_BT, scale)
    return out
