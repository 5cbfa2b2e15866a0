"""Tiny random checkpoints of every family, made and saved by transformers itself.

    folder = build_checkpoint(tmp_path, "smolvlm")                   # config.json and model.safetensors
    folder = build_checkpoint(tmp_path, "tied", processor=True)      # the tokenizer's and processors' files as well
    batch = make_batch(folder, tiles=[2, 0, 3])                      # ids, masks and pixels for such a checkpoint

Weights are scaled so that every part matters: norms are not all ones, biases not zero, logits of order one.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import build_processor_files, token_ids

IMAGE_TOKEN, PAD_TOKEN, VOCAB = 458, 2, 464

TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# 27 patches a side and a remainder of pixels that no patch covers, as 384/14 has.
TOWER_27 = {**TOWER, "image_size": 82, "patch_size": 3, "intermediate_size": 77}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD_TOKEN,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 6.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "smolvlm": {"model_type": "smolvlm", "scale_factor": 2},
    "idefics3": {"model_type": "idefics3", "scale_factor": 4},
    "grid27": {
        "model_type": "idefics3",
        "scale_factor": 3,
        "vision_config": TOWER_27,
        "text_config": {**TEXT, "num_key_value_heads": 9, "rope_theta": 273768.0},
    },
    "tied": {
        "model_type": "idefics3",
        "scale_factor": 2,
        "tie_word_embeddings": True,
        "text_config": {**TEXT, "tie_word_embeddings": True},
    },
    "llama3_rope": {
        "model_type": "idefics3",
        "scale_factor": 2,
        "text_config": {**TEXT, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "head_dim": 12,
                        "num_attention_heads": 3, "num_key_value_heads": 1},
    },
    "granite": {"model_type": "smolvlm", "scale_factor": 2, "text_config": {**TEXT, **GRANITE}},
    "docling": {  # granite-docling: Idefics3 around Granite, one tensor for head and embedding
        "model_type": "idefics3",
        "scale_factor": 2,
        "tie_word_embeddings": True,
        # A tied head repeats what it read, unless the layers have their say.
        "text_config": {**TEXT, **GRANITE, "embedding_multiplier": 1.5, "residual_multiplier": 1.3,
                        "tie_word_embeddings": True},
    },
}  # fmt: skip


def build_checkpoint(
    folder: str | Path,
    family: str = "smolvlm",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    processor: bool = False,
    max_shard_size: str = "5GB",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Save a random checkpoint of ``family`` (a key of FAMILIES) into ``folder``.

    processor: also write tokenizer and processor files (with the vocabulary and tile size that the model has).
    vision, text, changes: fields of the two sub-configurations and of the configuration itself to override.
    """
    folder = Path(folder)
    model = build_model(family, seed=seed, vision=vision, text=text, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if processor:
        tower = model.config.vision_config
        side = tower.image_size // tower.patch_size // model.config.scale_factor
        build_processor_files(
            folder, model_type=model.config.model_type, tile=tower.image_size, longest_edge=4 * tower.image_size,
            image_seq_len=side * side, video_edge=tower.image_size,
        )  # fmt: skip
        ids = token_ids(folder)
        assert ids["<image>"] == IMAGE_TOKEN and max(ids.values()) < VOCAB, ids["<image>"]
    return folder


def build_model(
    family: str = "smolvlm",
    *,
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """The transformers model that ``build_checkpoint`` saves, in fp32 and evaluation mode."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )

    values = {"image_token_id": IMAGE_TOKEN, "vision_config": TOWER, "text_config": TEXT, **FAMILIES[family], **changes}
    values["vision_config"] = {**values["vision_config"], **(vision or {})}
    values["text_config"] = {**values["text_config"], **(text or {})}
    smolvlm = values.pop("model_type") == "smolvlm"
    config = (SmolVLMConfig if smolvlm else Idefics3Config)(**values)
    model = (SmolVLMForConditionalGeneration if smolvlm else Idefics3ForConditionalGeneration)(config).eval()
    _randomise(model, seed)
    model.generation_config.eos_token_id = None  # random models end nowhere: comparisons run to their full length
    return model


def load_peer(folder: str | Path, dtype: torch.dtype = torch.float32, *, exact_positions: bool = True) -> Any:
    """The checkpoint in ``folder`` as transformers loads it, in evaluation mode.

    transformers 4.57 computes position ids in the pixels' dtype and in fp32 gives a full tile 0, 0, 1, … instead of
    0, 1, 2, … (in bf16, in which the released models were trained, it does not). With ``exact_positions`` its tower
    gets transformers 5's arithmetic.
    """
    import transformers
    from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

    smolvlm = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"] == "smolvlm"
    peer = SmolVLMForConditionalGeneration if smolvlm else Idefics3ForConditionalGeneration
    model = peer.from_pretrained(folder, torch_dtype=dtype).eval()
    if exact_positions and transformers.__version__ < "5":
        model.model.vision_model.embeddings.forward = functools.partial(
            _embed_as_transformers_5, model.model.vision_model.embeddings
        )
    return model


def _embed_as_transformers_5(embeddings: Any, pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
    """transformers 5's arithmetic for position ids (single precision, clamped), in transformers 4's module."""
    side, mask = embeddings.num_patches_per_side, patch_attention_mask
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    rows = torch.arange(mask.shape[1]) * (1.0 / mask[:, :, 0].sum(1))[:, None]
    cols = torch.arange(mask.shape[2]) * (1.0 / mask[:, 0, :].sum(1))[:, None]
    row_ids = torch.bucketize(rows.clamp(max=1 - 1e-6), boundaries, right=True)
    col_ids = torch.bucketize(cols.clamp(max=1 - 1e-6), boundaries, right=True)
    ids = (row_ids[:, :, None] * side + col_ids[:, None, :]).flatten(1)
    patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    hidden: Tensor = patches + embeddings.position_embedding(torch.where(mask.flatten(1), ids, 0))
    return hidden


def make_batch(folder: str | Path, tiles: list[int], *, seed: int = 0, words: int = 6) -> dict[str, Tensor]:
    """A left-padded batch: row i has ``tiles[i]`` tiles amid text. Keys as the processors return them.

    Without any tile in the batch there are no pixels. The last tile of each row is covered to two thirds only, so that
    masks matter.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    vision, generator = config["vision_config"], torch.Generator().manual_seed(seed)
    side, patch = vision["image_size"], vision["patch_size"]
    tokens = (side // patch // config["scale_factor"]) ** 2
    rows = []
    for count in tiles:
        parts = [torch.randint(3, 400, (words + count,), generator=generator)]
        for _ in range(count):
            parts += [torch.full((tokens,), IMAGE_TOKEN), torch.randint(3, 400, (2,), generator=generator)]
        rows.append(torch.cat(parts))
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD_TOKEN)
    attention = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        attention[i, length - len(row) :] = 1
    batch = {"input_ids": ids, "attention_mask": attention}
    most = max(tiles)
    if not most:
        return batch
    pixels = torch.rand(len(rows), most, 3, side, side, generator=generator) * 2 - 1
    mask = torch.ones(len(rows), most, side, side, dtype=torch.bool)
    for i, count in enumerate(tiles):
        if count:
            mask[i, count - 1, side * 2 // 3 :] = False
        mask[i, count:] = False
    pixels = pixels * mask[:, :, None]
    return {**batch, "pixel_values": pixels, "pixel_attention_mask": mask.long()}


def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            elif "embed" in name and weight.dim() == 2:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
