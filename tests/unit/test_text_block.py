"""Our decoder block stands where FMS's own stand: the same names, the same numbers to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fms.models.granite import GraniteBlock, GraniteConfig
from fms.models.llama import LLaMABlock, LLaMAConfig
from fms.modules.positions import RotaryEmbedding
from torch import nn

from smolvlm_fms.config import TextConfig
from smolvlm_fms.modules.text_block import TextBlock
from smolvlm_fms.modules.vision import grow_factor

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
}


def fms_block(config: TextConfig, rotary: RotaryEmbedding, fused: bool) -> nn.Module:
    common: dict[str, Any] = {
        "src_vocab_size": config.vocab_size,
        "emb_dim": config.hidden_size,
        "norm_eps": config.rms_norm_eps,
        "nheads": config.num_attention_heads,
        "kvheads": config.num_key_value_heads,
        "nlayers": 1,
        "hidden_grow_factor": grow_factor(config.hidden_size, config.intermediate_size),
        "multiple_of": 1,
        "activation_fn": config.hidden_act,
        "fused_weights": fused,
    }
    if config.model_type == "llama":
        return LLaMABlock(LLaMAConfig(**common), rotary)
    multipliers = {
        "head_dim": config.head_dim,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.attention_multiplier,
    }
    return GraniteBlock(GraniteConfig(**common, **multipliers), rotary)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_a_block_is_fmss_own_to_the_bit(model_type: str, dtype: torch.dtype, fused: bool) -> None:
    multipliers = {"residual_multiplier": 0.22, "attention_multiplier": 0.3} if model_type == "granite" else {}
    config = TextConfig(model_type=model_type, **SIZES, **multipliers)
    torch.manual_seed(0)
    rotary = RotaryEmbedding(dim=4, ratio=10000.0, max_seq_len=64)
    rotary.compute_freqs_cis(torch.device("cpu"), 64)
    theirs = fms_block(config, rotary, fused).eval()
    ours = TextBlock(config, rotary, fused, None).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    hidden_BTD = torch.randn(2, 11, 36, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ours(hidden_BTD), theirs(hidden_BTD))
        (out, cache), (expected, expected_cache) = (
            block(hidden_BTD, use_cache=True, attn_name="sdpa_causal") for block in (ours, theirs)
        )
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(cache, expected_cache, strict=True))
