"""FMS's own test suites over our architectures; those for transformers' interface are in ``test_hf_fms_suite``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.config_llava import LlavaNextConfig, LlavaVisionConfig
from smolvlm_fms.model.llava_next import LlavaNext
from smolvlm_fms.model.smolvlm import SmolVLM
from tests.fms_suites import WARNINGS, ModelCompileTestSuite, ModelConfigTestSuite, ModelConsistencyTestSuite

pytestmark = WARNINGS

KEYS = """
connector.proj.weight
text_model.base_model.dec_norm.weight
text_model.base_model.embedding.weight
text_model.base_model.layers.0.attn.dense.weight
text_model.base_model.layers.0.attn.in_proj.qkv_fused.weight
text_model.base_model.layers.0.ff_ln.weight
text_model.base_model.layers.0.ff_sub_layer.w2.weight
text_model.base_model.layers.0.ff_sub_layer.wg1_fused.weight
text_model.base_model.layers.0.ln.weight
text_model.head.weight
vision_tower.embeddings.patch_embedding.bias
vision_tower.embeddings.patch_embedding.weight
vision_tower.embeddings.position_embedding.weight
vision_tower.layers.0.attn.dense.bias
vision_tower.layers.0.attn.dense.weight
vision_tower.layers.0.attn.in_proj.qkv_fused.bias
vision_tower.layers.0.attn.in_proj.qkv_fused.weight
vision_tower.layers.0.ln1.bias
vision_tower.layers.0.ln1.weight
vision_tower.layers.0.ln2.bias
vision_tower.layers.0.ln2.weight
vision_tower.layers.0.mlp.w1.bias
vision_tower.layers.0.mlp.w1.weight
vision_tower.layers.0.mlp.w2.bias
vision_tower.layers.0.mlp.w2.weight
vision_tower.post_layernorm.bias
vision_tower.post_layernorm.weight
"""

LLAVA_KEYS = """
image_newline
projector.linear_1.bias
projector.linear_1.weight
projector.linear_2.bias
projector.linear_2.weight
text_model.base_model.dec_norm.weight
text_model.base_model.embedding.weight
text_model.base_model.layers.0.attn.dense.weight
text_model.base_model.layers.0.attn.in_proj.qkv_fused.weight
text_model.base_model.layers.0.ff_ln.weight
text_model.base_model.layers.0.ff_sub_layer.w2.weight
text_model.base_model.layers.0.ff_sub_layer.wg1_fused.weight
text_model.base_model.layers.0.ln.weight
text_model.head.weight
vision_tower.embeddings.patch_embedding.bias
vision_tower.embeddings.patch_embedding.weight
vision_tower.embeddings.position_embedding.weight
vision_tower.layers.0.attn.dense.bias
vision_tower.layers.0.attn.dense.weight
vision_tower.layers.0.attn.in_proj.qkv_fused.bias
vision_tower.layers.0.attn.in_proj.qkv_fused.weight
vision_tower.layers.0.ln1.bias
vision_tower.layers.0.ln1.weight
vision_tower.layers.0.ln2.bias
vision_tower.layers.0.ln2.weight
vision_tower.layers.0.mlp.w1.bias
vision_tower.layers.0.mlp.w1.weight
vision_tower.layers.0.mlp.w2.bias
vision_tower.layers.0.mlp.w2.weight
vision_tower.post_layernorm.bias
vision_tower.post_layernorm.weight
"""


class TestSmolVLM(ModelConfigTestSuite, ModelConsistencyTestSuite, ModelCompileTestSuite):  # type: ignore[misc]
    """Configuration round trips, stable names and numbers, unfused weights, one graph for the whole forward pass."""

    _get_signature_params = ["input_ids"]  # noqa: RUF012  (the suite's own interface)

    @pytest.fixture(scope="class", autouse=True)
    def config(self) -> SmolVLMConfig:
        text = TextConfig(
            vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        vision = VisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=2,
        )  # fmt: skip
        return SmolVLMConfig(vision, text, scale_factor=2, image_token_id=63)

    @pytest.fixture(scope="class", autouse=True)
    def uninitialized_model(self, config: SmolVLMConfig) -> SmolVLM:
        return SmolVLM(config)

    @pytest.fixture
    def capture_expectation(self) -> bool:
        return False

    @pytest.fixture(scope="class", autouse=True)
    def signature(self, model: SmolVLM) -> list[float]:
        """FMS keeps these numbers in a file; ours come from the same weights, run without any of the model's tricks."""
        with torch.no_grad():
            logits = model(torch.arange(16)[None])
        spread = logits.max(2)[0] - logits.min(2)[0]
        values: list[float] = (spread.squeeze() - spread.min()).tolist()
        return values

    def _get_expectation_path(self, test_name: str, model_id: str | None) -> str:
        """The suite reads expected names from a file beside the tests; they stand above."""
        assert test_name == "test_model_weight_keys"
        path = Path(tempfile.mkdtemp()) / test_name
        path.write_text(",".join(KEYS.split()), encoding="utf-8")
        return str(path)

    @pytest.mark.parametrize("length", [16, 7])
    def test_validate_tokens_and_embeddings_agree(self, model: SmolVLM, length: int) -> None:
        ids = torch.arange(length)[None]
        with torch.no_grad():
            embeddings: Tensor = model.text_model.base_model.embed(ids)
            torch.testing.assert_close(model(embeddings), model(ids))


class TestLlavaNext(ModelConfigTestSuite, ModelConsistencyTestSuite):  # type: ignore[misc]
    """The same for LLaVA-Next, less the compiler: the text that it runs is SmolVLM's."""

    _get_signature_params = ["input_ids"]  # noqa: RUF012  (the suite's own interface)
    capture_expectation = TestSmolVLM.capture_expectation
    signature = TestSmolVLM.signature

    @pytest.fixture(scope="class", autouse=True)
    def config(self) -> LlavaNextConfig:
        text = TextConfig(
            model_type="granite", vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, embedding_multiplier=3.0,
        )  # fmt: skip
        vision = LlavaVisionConfig(
            model_type="siglip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, image_size=8, patch_size=2, hidden_act="gelu_pytorch_tanh",
        )  # fmt: skip
        return LlavaNextConfig(
            vision, text, image_token_id=63, vision_feature_layer=[-2, -1], vision_feature_select_strategy="full",
            image_grid_pinpoints=[[8, 16], [16, 8]],
        )  # fmt: skip

    @pytest.fixture(scope="class", autouse=True)
    def uninitialized_model(self, config: LlavaNextConfig) -> LlavaNext:
        return LlavaNext(config)

    def _get_expectation_path(self, test_name: str, model_id: str | None) -> str:
        assert test_name == "test_model_weight_keys"
        path = Path(tempfile.mkdtemp()) / test_name
        path.write_text(",".join(LLAVA_KEYS.split()), encoding="utf-8")
        return str(path)
