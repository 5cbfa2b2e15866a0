"""The attention that training takes on a CPU in bfloat16 is attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from smolvlm_fms.modules.attention import _trains_on_cpu, sdpa


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_matrix_products_give_the_same_as_torchs_operator(causal: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 30, 16).bfloat16().requires_grad_()
    key, value = (torch.randn(2, kv_heads, 30, 16).bfloat16().requires_grad_() for _ in range(2))
    assert _trains_on_cpu(query, key)
    out = sdpa(query, key, value, 0.0, None, is_causal_mask=causal)
    weights = torch.randn_like(out)
    mine = torch.autograd.grad((out * weights).sum(), (query, key, value))
    exact = [x.detach().float().requires_grad_() for x in (query, key, value)]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=causal, enable_gqa=True).transpose(1, 2)
    theirs = torch.autograd.grad((wanted * weights.float()).sum(), exact)
    assert torch.allclose(out.float(), wanted, atol=0.03)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()


def test_inference_float32_and_huge_scores_keep_torchs_operator() -> None:
    query = torch.randn(1, 2, 8, 4).bfloat16()
    assert not _trains_on_cpu(query, query)
    assert not _trains_on_cpu(query.float().requires_grad_(), query.float())
    huge = torch.empty(9, 8, 1024, 4, dtype=torch.bfloat16).requires_grad_()
    assert not _trains_on_cpu(huge, huge)
    with torch.no_grad():
        assert not _trains_on_cpu(query.requires_grad_(), query)
