"""FMS's own test suites over our architecture. The only module that imports ``fms.testing``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from fms.testing._internal.model_test_suite import (
    ModelCompileTestSuite,
    ModelConfigTestSuite,
    ModelConsistencyTestSuite,
)
from torch import Tensor

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.model.smolvlm import SmolVLM

# FMS's suites are written for pytest before 10, and leave the file that they read open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Class-scoped fixtures defined as instance methods"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # from inside torch's compiler
]

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


class TestSmolVLM(ModelConfigTestSuite, ModelConsistencyTestSuite, ModelCompileTestSuite):
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
