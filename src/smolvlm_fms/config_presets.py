"""The released variants of SmolVLM and Idefics3, by the names under which FMS registers them."""

from __future__ import annotations

from typing import Any

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig

__all__ = ["PRESETS"]


def _tower_base() -> VisionConfig:
    return VisionConfig(hidden_size=768, num_attention_heads=12, image_size=512, patch_size=16)


def _tower_so400m(image_size: int) -> VisionConfig:
    return VisionConfig(
        intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=image_size, patch_size=14
    )


def _smollm2(hidden: int, ff: int, layers: int, heads: int, kv: int, **other: Any) -> TextConfig:
    values: dict[str, Any] = {
        "vocab_size": 49280,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "pad_token_id": 2,
    }
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        **(values | other),
    )


def _presets() -> dict[str, SmolVLMConfig]:
    """Released variants by the name under which FMS registers them. A checkpoint's own file overrides these."""

    def small(kind: str) -> SmolVLMConfig:
        text = _smollm2(576, 1536, 30, 9, 3)
        return SmolVLMConfig(_tower_base(), text, kind, scale_factor=4, image_token_id=49190)

    def middle(kind: str) -> SmolVLMConfig:
        text = _smollm2(960, 2560, 32, 15, 5)
        return SmolVLMConfig(_tower_base(), text, kind, scale_factor=4, image_token_id=49190)

    def large(kind: str, image_token: int, **text: Any) -> SmolVLMConfig:
        backbone = _smollm2(2048, 8192, 24, 32, 32, **text)
        return SmolVLMConfig(_tower_so400m(384), backbone, kind, scale_factor=3, image_token_id=image_token)

    llama3 = TextConfig(
        vocab_size=128259,
        hidden_size=4096,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        pad_token_id=128002,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    )
    ids = {"pad_token_id": 100257, "bos_token_id": 100264, "eos_token_id": 100257}
    granite_docling = SmolVLMConfig(
        _tower_base(),
        _smollm2(576, 1536, 30, 9, 3, vocab_size=100352, **ids),
        "idefics3",
        scale_factor=4,
        image_token_id=100270,
        pad_token_id=100257,
        tie_word_embeddings=True,
    )
    return {
        "256m_instruct": small("idefics3"),
        "500m_instruct": middle("idefics3"),
        # The first 2.2B's context was stretched to 16k by a larger RoPE base; the second kept SmolLM2-1.7B's.
        "2.2b_instruct": large("idefics3", 49153, vocab_size=49155, max_position_embeddings=16384, rope_theta=273768.0),
        "v2_256m_video_instruct": small("smolvlm"),
        "v2_500m_video_instruct": middle("smolvlm"),
        "v2_2.2b_instruct": large("smolvlm", 49190, rope_theta=130000.0),
        "smoldocling_256m": small("idefics3"),
        "granite_docling_258m": granite_docling,
        "idefics3_8b_llama3": SmolVLMConfig(_tower_so400m(364), llama3, "idefics3", image_token_id=128257),
    }


PRESETS: dict[str, SmolVLMConfig] = _presets()
"""Released variants by name (``fms.models.get_model("smolvlm", name)``)."""
