"""The CPU kernels as torch functions: tensors in, tensors out. Inference only: nothing here has a backward.

Every function is a ``torch.library`` operator of the namespace ``smolvlm_fms`` with a fake implementation. All work in
bf16 with fp32 sums, on the number of threads that torch uses. B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smolvlm_fms.engine.kernels import loader
from smolvlm_fms.engine.kernels.cache import PackedCache, c_cache
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


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, subtract_mean: bool) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    weight = weight.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    args = loader.NormArgs(
        x=flat.data_ptr(),
        weight=weight.data_ptr(),
        bias=loader.pointer(bias),
        out=out.data_ptr(),
        rows=flat.shape[0],
        width=flat.shape[1],
        x_stride=flat.stride(0),
        subtract_mean=int(subtract_mean),
        eps=eps,
        threads=torch.get_num_threads(),
    )
    loader.check(loader.library().svk_norm(args), "norm")
    return out


def _norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, subtract_mean: bool) -> Tensor:
    return x.new_empty(x.shape)


operator("norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool subtract_mean) -> Tensor", _norm, _norm_fake)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, fp32 inside: x (..., D) bf16 and weight (D,) -> (..., D) bf16."""
    require_bf16("x", x)
    out: Tensor = torch.ops.smolvlm_fms.norm(x, weight, None, eps, False)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, fp32 inside: x (..., D) bf16, weight and bias (D,) -> (..., D) bf16."""
    require_bf16("x", x)
    out: Tensor = torch.ops.smolvlm_fms.norm(x, weight, bias, eps, True)
    return out


def _causal_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    layer: int,
    start: int,
    position: int,
    scale: float,
    interleaved: bool,
) -> Tensor:
    qkv = qkv.contiguous()
    d, kv_heads = cos.shape[1] * 2, keys.shape[1]
    out = torch.empty((len(qkv), heads * d), dtype=torch.bfloat16)
    args = loader.CausalAttentionArgs(
        qkv=qkv.data_ptr(),
        out=out.data_ptr(),
        rows=len(qkv),
        out_stride=heads * d,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        layer=layer,
        start=start,
        position=position,
        scale=scale,
        threads=torch.get_num_threads(),
    )
    rope = loader.Rope(cos.data_ptr(), sin.data_ptr(), int(interleaved))
    loader.check(loader.library().svk_causal_attention(c_cache(keys, values), rope, args), "causal_attention")
    return out


def _causal_attention_fake(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    layer: int,
    start: int,
    position: int,
    scale: float,
    interleaved: bool,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], heads * cos.shape[1] * 2))


operator(
    "causal_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin, int heads, int layer, "
    "int start, int position, float scale, bool interleaved) -> Tensor",
    _causal_attention,
    _causal_attention_fake,
)


def causal_attention(
    qkv_TE: Tensor,
    cache: PackedCache,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    layer: int,
    start: int,
    position: int,
    scale: float | None = None,
    interleaved: bool = True,
) -> Tensor:
    """Rotates queries and keys, stores keys and values, and lets T consecutive rows attend to themselves and the past.

    ``qkv_TE`` (T, (heads + 2 kv_heads) D) bf16: queries, keys, values, not rotated; the first row at ``position`` of
    the sequence whose run of the cache starts at ``start``; ``cos`` and ``sin`` fp32 (positions, D/2). Answers bf16
    (T, heads*D).

    Raises: InputError for another dtype or shape, or positions outside the cache or the tables.
    """
    require_bf16("qkv", qkv_TE)
    d = cache.head_dim
    if qkv_TE.dim() != 2 or qkv_TE.shape[1] != (heads + 2 * cache.kv_heads) * d or heads % cache.kv_heads:
        raise InputError(
            f"qkv must be (T, (heads + 2*{cache.kv_heads}) * {d}); got {tuple(qkv_TE.shape)}, {heads} heads"
        )
    if cos.dtype != torch.float32 or cos.shape[1:] != (d // 2,) or cos.shape != sin.shape or sin.dtype != cos.dtype:
        raise InputError(f"cos and sin are fp32 (positions, {d // 2}); got {cos.dtype} {tuple(cos.shape)}")
    if position < 0 or position + len(qkv_TE) > len(cos) or not 0 <= layer < cache.layers:
        raise InputError(
            f"layer {layer}, positions {position} + {len(qkv_TE)}: outside the cache or the rotation tables"
        )
    cache.check_positions(start, position + len(qkv_TE))
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    out: Tensor = torch.ops.smolvlm_fms.causal_attention(
        qkv_TE,
        cache.keys,
        cache.values,
        cos.contiguous(),
        sin.contiguous(),
        heads,
        layer,
        start,
        position,
        scale,
        interleaved,
    )
    return out
