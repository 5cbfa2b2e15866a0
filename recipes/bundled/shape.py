"""Size and shape of the bundled model: SmolVLM's architecture, small."""

from __future__ import annotations

from pathlib import Path

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from tokenizers import Tokenizer

from draw import TILE


def config(tokenizer: Tokenizer, width: int = 192, tower_layers: int = 6, text_layers: int = 4) -> SmolVLMConfig:
    """One tile of 128 pixels, 64 patches of 16, 64 image tokens."""
    ids = {
        name: tokenizer.token_to_id(name) for name in ("<image>", "<|im_end|>", "<end_of_utterance>", "<|im_start|>")
    }
    return SmolVLMConfig(
        vision=VisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=tower_layers,
            num_attention_heads=width // 64, image_size=TILE, patch_size=16,
        ),
        text=TextConfig(
            vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64, hidden_size=192, intermediate_size=512,
            num_hidden_layers=text_layers, num_attention_heads=3, num_key_value_heads=3, head_dim=64,
            max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0,
            pad_token_id=ids["<|im_end|>"], bos_token_id=ids["<|im_start|>"], eos_token_id=ids["<end_of_utterance>"],
        ),
        scale_factor=1, image_token_id=ids["<image>"], pad_token_id=ids["<|im_end|>"], tie_word_embeddings=True,
        dtype="bfloat16",
    )  # fmt: skip


def tokenizer(work: Path) -> Tokenizer:
    return Tokenizer.from_file(str(work / "tokenizer.json"))
