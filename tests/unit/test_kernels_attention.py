"""Attention kernels against fp64 at head sizes and lengths that fill no panel or tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smolvlm_fms.engine import kernels
from smolvlm_fms.errors import InputError
from tests.unit.test_kernels_linear import runnable_isas

pytestmark = pytest.mark.skipif(not kernels.built(), reason="the CPU kernels were not built here")


def softmax_attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, visible: Tensor, scale: float) -> Tensor:
    """fp64; ``visible`` (broadcast to B, H, T, S) is True where a query sees a key; zeros where it sees none."""
    scores = q_BHTD.double() @ k_BHSD.double().transpose(2, 3) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1)) if not visible.any(-1).all() else scores.softmax(-1)
    return weights @ v_BHSD.double()


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("d", [16, 48, 64, 72, 80, 128])
def test_vision_attention_is_close_to_fp64(isa: str, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    with kernels.use_isa(isa):
        for batch, tokens, heads in [(1, 1, 1), (2, 63, 3), (1, 64, 2), (1, 131, 5), (3, 16, 1)]:
            qkv = torch.randn(batch, tokens, 3, heads, d, generator=generator).bfloat16()
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            want = softmax_attention(q, k, v, torch.ones((), dtype=torch.bool), d**-0.5).transpose(1, 2).flatten(2)
            got = kernels.vision_attention(qkv)
            assert (got.double() - want).abs().max() < 0.012  # values of size one, weights rounded to bf16


@pytest.mark.parametrize("isa", runnable_isas())
def test_vision_attention_leaves_masked_keys_out(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 70, 3, 2, 64, generator=generator).bfloat16()
    mask = torch.rand(3, 70, generator=generator) > 0.4
    mask[2] = False
    poisoned = qkv.clone()
    poisoned[:, :, 1:][~mask] = torch.nan  # keys and values that nobody may see
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    want = softmax_attention(q, k, v, mask[:, None, None], 0.25).transpose(1, 2).flatten(2)
    with kernels.use_isa(isa):
        got = kernels.vision_attention(poisoned, mask, scale=0.25)
    assert (got.double() - want).abs().max() < 0.02
    assert not got[2].any()


@pytest.mark.parametrize("isa", runnable_isas())
def test_vision_attention_with_extreme_values(isa: str) -> None:
    qkv = torch.randn(1, 40, 3, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    qkv[0, 3, 0, 0] = 1e-40  # a denormal query looks at all keys alike
    qkv[0, 4, 0, 0] = 1e4  # scores of thousands: one key takes all
    qkv[0, 5, 0, 0, 2] = torch.nan
    with kernels.use_isa(isa):
        got = kernels.vision_attention(qkv).unflatten(2, (2, 32))[0].double()
    values = qkv[0, :, 2, 0].double()
    assert (got[3, 0] - values.mean(0)).abs().max() < 0.01
    best = (qkv[0, 4, 0, 0].double() @ qkv[0, :, 1, 0].double().T).argmax()
    assert (got[4, 0] - values[best]).abs().max() < 0.01
    assert got[5, 0].isnan().all()
    others = torch.cat([got[:5, 0], got[6:, 0], got[:, 1]])
    assert others.isfinite().all()


def test_vision_attention_does_not_depend_on_neighbours_or_threads() -> None:
    qkv = torch.randn(4, 90, 3, 3, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    together = kernels.vision_attention(qkv)
    assert torch.equal(together, torch.cat([kernels.vision_attention(one) for one in qkv.split(1)]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)  # more threads than heads in one picture: queries are cut
        assert torch.equal(kernels.vision_attention(qkv[:1]), together[:1])
    finally:
        torch.set_num_threads(before)


def test_vision_attention_exports_and_checks_its_input() -> None:
    class Attend(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return kernels.vision_attention(qkv)

    qkv = torch.randn(1, 9, 3, 2, 16).bfloat16()
    exported = torch.export.export(Attend(), (qkv,))
    assert torch.equal(exported.module()(qkv), kernels.vision_attention(qkv))
    with pytest.raises(InputError, match=r"got torch\.float32"):
        kernels.vision_attention(qkv.float())
    with pytest.raises(InputError, match=r"must be \(B, T, 3, H, D\)"):
        kernels.vision_attention(qkv[:, :, 0])
    with pytest.raises(InputError, match="mask must be"):
        kernels.vision_attention(qkv, torch.ones(1, 8, dtype=torch.bool))
