"""Where FMS is at fault and we go around it. A test here fails when upstream is fixed: then the workaround can go."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fms import models
from fms.models import get_model
from fms.models.llama import LLaMA, LLaMAConfig
from fms.modules.attention import MultiHeadAttention
from fms.modules.layernorm import LayerNormParameterized
from torch import nn

SHAPE = {"src_vocab_size": 50, "emb_dim": 16, "nheads": 2, "nlayers": 1, "max_expected_seq_len": 32, "multiple_of": 8}


@pytest.fixture
def llama() -> LLaMA:
    torch.manual_seed(0)
    model = LLaMA(LLaMAConfig(**SHAPE)).eval()
    model.reset_parameters()
    model.post_init()
    return model


def test_get_model_passes_vision_only_to_every_factory() -> None:
    """Our factories take it (``SmolVLM.__init__``)."""
    seen: dict[str, Any] = {}

    def factory(**arguments: Any) -> nn.Module:
        seen.update(arguments)
        return nn.Linear(1, 1)

    if "smolvlm_upstream" not in models.list_models():
        models.register_model("smolvlm_upstream", "probe", lambda **arguments: factory(**arguments))
        get_model("smolvlm_upstream", "probe")
        assert seen == {"vision_only": False}


def test_unknown_fields_are_passed_over() -> None:
    """Ours raise (``config.BaseConfig.updated``)."""
    assert LLaMAConfig(**SHAPE).updated(emb_dimm=99).emb_dim == 16


def test_missing_tensors_are_left_uninitialised(llama: LLaMA, tmp_path: Path) -> None:
    """Ours raise (``model.lifecycle.finish``)."""
    state = llama.state_dict()
    del state["base_model.dec_norm.weight"]
    torch.save(state, tmp_path / "model.pth")
    assert get_model("llama", "micro", model_path=str(tmp_path / "model.pth"), **SHAPE)


def test_an_unknown_source_is_taken_for_fms_own(llama: LLaMA, tmp_path: Path) -> None:
    """Ours raise (``fms_bridge.register``)."""
    torch.save(llama.state_dict(), tmp_path / "model.pth")
    assert get_model("llama", "micro", model_path=str(tmp_path / "model.pth"), source="nonsense", **SHAPE)


def test_siglip_cannot_be_initialised() -> None:
    """Ours is its own (``modules.vision``)."""
    from fms.models.siglip_vision import SiglipVision, SiglipVisionConfig

    config = SiglipVisionConfig(hidden_size=16, intermediate_size=16, nlayers=1, nheads=2, image_size=16, patch_size=8)
    with pytest.raises(RecursionError):
        SiglipVision(config).reset_parameters()


def test_attention_mistakes_the_layout_where_there_are_as_many_tokens_as_heads() -> None:
    """Ours names it (``modules.attention``)."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 8, 8, 2, 2, p_dropout=0.0).eval()
    attention.reset_parameters()
    for tokens, agrees in ((2, False), (3, True)):
        x = torch.randn(1, tokens, 16)
        cached, _ = attention(x, use_cache=True, is_causal_mask=True)
        assert torch.allclose(attention(x, is_causal_mask=True), cached, atol=1e-6) == agrees


def test_rope_tables_do_not_grow(llama: LLaMA) -> None:
    """Ours do (``TextBackbone.prepare_rope``)."""
    with pytest.raises(IndexError):
        llama(torch.randint(3, 40, (1, 40)))


def test_layer_norm_takes_the_mean_in_the_inputs_own_precision() -> None:
    """The tower uses torch's."""
    theirs = LayerNormParameterized(768, elementwise_shift=True, use_mean=True)
    theirs.reset_parameters()
    theirs.bfloat16()
    x = (torch.randn(64, 768, generator=torch.Generator().manual_seed(0)) + 8).bfloat16()
    exact = nn.functional.layer_norm(x.float(), (768,), eps=1e-6)
    error = (theirs(x).float() - exact).abs().mean()
    assert error > 2 * (nn.LayerNorm(768, eps=1e-6).bfloat16()(x).float() - exact).abs().mean()


def test_widths_are_cut_short() -> None:
    """FMS computes int(factor * width); ``modules.vision.grow_factor`` finds a factor that gives the width."""
    sizes = [(width, hidden) for width in range(1, 120) for hidden in range(1, 120)]
    assert [size for size in sizes if int(size[1] / size[0] * size[0]) != size[1]]


def test_out_of_tree_models_are_refused_by_to_hf_api() -> None:
    """Ours has its own (``hf.to_hf_api``)."""
    from fms.models.hf import to_hf_api

    class Other(nn.Module):
        pass

    with pytest.raises(ValueError, match="is not one of"):
        to_hf_api(Other())


def test_adapted_models_cannot_generate_under_transformers_5(llama: LLaMA) -> None:
    from fms.models.hf import to_hf_api

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = to_hf_api(llama)
        with pytest.raises(TypeError):
            adapted.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)


def test_hf_pretrained_leaves_the_path_among_the_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Our factories drop it (``fms_bridge.register``)."""
    import fms.models.hf.utils

    def infer(*_: Any, **__: Any) -> dict[str, Any]:
        return {"architecture": "smolvlm_upstream2", "variant": "probe", "model_path": str(tmp_path)}

    seen: dict[str, Any] = {}

    def factory(**arguments: Any) -> nn.Module:
        seen.update(arguments)
        return nn.Linear(1, 1)

    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "model.pt")
    monkeypatch.setattr(fms.models.hf.utils, "infer_model_configuration", infer)
    models.register_model("smolvlm_upstream2", "probe", factory)
    get_model("hf_pretrained", model_path=str(tmp_path))
    assert seen["model_path"] == str(tmp_path)
