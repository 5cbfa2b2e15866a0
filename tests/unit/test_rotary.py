"""Our RoPE: FMS's rotation in the order of channels that checkpoints have, and with it transformers' keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fms.modules.positions import RotaryEmbedding
from torch import Tensor

from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.modules.rotary import Rotary
from tests.tiny_models import LLAMA3_ROPE, build_checkpoint, load_peer, make_batch


def halves(x_BTHD: Tensor) -> Tensor:
    """Neighbours (2i, 2i + 1) to halves (i, i + D/2)."""
    return torch.cat((x_BTHD[..., 0::2], x_BTHD[..., 1::2]), -1)


@pytest.mark.parametrize("scaling", [{}, LLAMA3_ROPE], ids=["plain", "llama3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_fmss_in_another_order(scaling: dict[str, object], dtype: torch.dtype) -> None:
    options = {"dim": 16, "ratio": 100000.0, "max_seq_len": 64, "scaling": scaling}
    ours, theirs = Rotary(**options), RotaryEmbedding(**options)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 6, 16, generator=generator).to(dtype)
    k = torch.randn(2, 9, 2, 16, generator=generator).to(dtype)
    for positions in (None, torch.arange(9)[None] + torch.tensor([[40], [3]])):
        for mine, expected in zip(ours.adjusted_qk(q, k, positions), theirs.adjusted_qk(q, k, positions), strict=True):
            assert mine.dtype == dtype and torch.equal(mine, halves(expected))


def test_positions_follow_the_cache() -> None:
    rotary = Rotary(dim=16, max_seq_len=64)
    q, k = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
    whole, _ = rotary.adjusted_qk(q, k)
    past = (torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    rest, _ = rotary.adjusted_qk(q[:, 3:], k[:, 3:], None, past, use_cache=True)
    assert torch.equal(rest, whole[:, 3:])


@pytest.mark.parametrize("family", ["smolvlm", "llama3_rope", "granite"])
def test_the_cache_holds_transformers_keys(tmp_path: Path, family: str) -> None:
    """One could go on with the other's cache; with FMS's order of channels the keys would be other numbers."""
    folder = build_checkpoint(tmp_path, family)
    ours, theirs = load_model(folder), load_peer(folder)
    ids = make_batch(folder, [0])["input_ids"]
    with torch.no_grad():
        _, cache = ours(ids, use_cache=True)
        expected = theirs(input_ids=ids, use_cache=True).past_key_values
    for number, (keys, values) in enumerate(cache):
        torch.testing.assert_close(keys, expected.layers[number].keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, expected.layers[number].values, rtol=1e-5, atol=1e-5)
