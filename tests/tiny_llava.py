"""Tiny random LLaVA-Next checkpoints, made and saved by transformers itself.

folder = build_llava(tmp_path, "granite")             # config.json and model.safetensors
batch = make_llava_batch(folder, [[0, 1], [], [2]])   # row 0 shows pictures 0 and 1 of SIZES, row 1 none …
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.config_llava import LlavaNextConfig
from tests.tiny_models import GRANITE, _randomise

IMAGE_TOKEN, PAD_TOKEN, VOCAB = 458, 2, 464

SIZES = [(60, 43), (31, 100), (30, 30), (500, 333), (1, 40), (97, 64)]
"""(height, width): portrait, landscape, square, large, a sliver, odd."""

# 30 // 7 leaves two columns of pixels that no patch covers, as 384 // 14 does.
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 7,
}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
CLIP = {**TOWER, "model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": PAD_TOKEN,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {
        "vision_config": SIGLIP,
        "text_config": {**TEXT, **GRANITE, "tie_word_embeddings": True},  # transformers 4 reads it here
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-6, -5, -3, -1],
        "tie_word_embeddings": True,
    },
    "mistral": {
        "vision_config": CLIP,
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
    },
    "vicuna": {
        "vision_config": {**CLIP, "image_size": 28},
        "text_config": {**TEXT, "model_type": "llama", "num_key_value_heads": 4},
        "vision_feature_layer": [-2, 3],
        "multimodal_projector_bias": False,
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    },
}


def build_llava(folder: str | Path, family: str, *, seed: int = 0, text: dict[str, Any] | None = None) -> Path:
    """Save a random checkpoint of ``family`` (a key of FAMILIES) into ``folder``; ``text``: fields to override."""
    from transformers import LlavaNextConfig as Config
    from transformers import LlavaNextForConditionalGeneration as Model

    values = {
        "image_token_index": IMAGE_TOKEN,
        "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]],
        **FAMILIES[family],
    }
    values["text_config"] = {**values["text_config"], **(text or {})}
    model = Model(Config(**values)).eval()
    _randomise(model, seed)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # random models end nowhere: comparisons run to their full length
    model.save_pretrained(folder)
    return Path(folder)


def load_llava_peer(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in ``folder`` as transformers loads it, in evaluation mode."""
    from transformers import LlavaNextForConditionalGeneration as Model

    return Model.from_pretrained(folder, dtype=dtype).eval()


def make_llava_batch(folder: str | Path, rows: list[list[int]], *, seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch; each row shows the pictures of SIZES whose numbers it lists. Keys as the processors' are."""
    config = LlavaNextConfig.from_hf(folder)
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for row in rows:
        parts = [torch.randint(3, 400, (5 + len(row),), generator=generator)]
        for picture in row:
            parts.append(torch.full((config.resolution.num_tokens(SIZES[picture]),), IMAGE_TOKEN))
            parts.append(torch.randint(3, 400, (2,), generator=generator))
        texts.append(torch.cat(parts))
    length = max(len(text) for text in texts)
    ids, mask = torch.full((len(rows), length), PAD_TOKEN), torch.zeros(len(rows), length, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, length - len(text) :] = text
        mask[i, length - len(text) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    shown = [SIZES[picture] for row in rows for picture in row]
    if not shown:
        return batch
    counts = [config.resolution.num_tiles(size) for size in shown]
    side = config.vision.image_size
    pixels = torch.zeros(len(shown), max(counts), 3, side, side)
    for picture, count in enumerate(counts):
        pixels[picture, :count] = torch.rand(count, 3, side, side, generator=generator) * 2 - 1
    return {**batch, "pixel_values": pixels, "image_sizes": torch.tensor(shown)}
