"""A task so small that a model of some thousand parameters learns it in seconds: name the colour of the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smolvlm_fms.config import SmolVLMConfig, TextConfig, VisionConfig
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.model.smolvlm import SmolVLM
from smolvlm_fms.training import IGNORE, Sample
from tests.tiny import build_processor_files, token_ids

IMAGE, PAD, STOP, TOKENS = 60, 2, 3, 4
"""Token ids, and image tokens a tile."""


def tiny_config(**changes: Any) -> SmolVLMConfig:
    vision = VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
    )  # fmt: skip
    values = {"vision": vision, "text": text, "scale_factor": 2, "image_token_id": IMAGE, "pad_token_id": PAD}
    return SmolVLMConfig(**(values | changes))


def tiny_model(seed: int = 0, **changes: Any) -> SmolVLM:
    torch.manual_seed(seed)
    model = SmolVLM(tiny_config(**changes))
    model.reset_parameters()
    model.post_init()
    return model


class Colours:
    """Sample i: a tile of one of three colours, a question of 1 … 4 tokens, the answer 20, 21 or 22, and STOP."""

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        colour, words = (int(torch.randint(n, (1,), generator=generator)) for n in (3, 4))
        pixels = torch.full((1, 3, 32, 32), 0, dtype=torch.uint8)
        pixels[:, colour] = 200 + index % 50
        prompt = [1, *[IMAGE] * TOKENS, *range(10, 11 + words)]
        answer = [20 + colour, STOP]
        return Sample(
            torch.tensor(prompt + answer), torch.tensor([IGNORE] * len(prompt) + answer), pixels, name=str(index)
        )


def tiny_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint folder that all our loaders and transformers read: tiles of 32 pixels, 4 tokens each."""
    build_processor_files(folder, longest_edge=64)
    ids = token_ids(folder)
    size = 4 * (max(ids.values()) // 4 + 1)
    base = tiny_config()
    text = base.text.updated(vocab_size=size, bos_token_id=ids["<|im_start|>"], eos_token_id=ids["<end_of_utterance>"])
    values = {"text": text, "image_token_id": ids["<image>"], "pad_token_id": ids["<|im_end|>"], "vision": base.vision}
    save_pretrained(tiny_model(seed, **(values | changes)), folder)
    return folder


def write_skill(folder: Path, count: int, start: int = 0) -> Path:
    """JSONL conversations, ``count`` of them, about pictures of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"red": (220, 30, 40), "blue": (30, 60, 220), "green": (40, 190, 60)}
    lines = []
    for number in range(start, start + count):
        name = list(names)[number % 3]
        shade = tuple(min(255, value + number % 20) for value in names[name])
        Image.new("RGB", (32, 32 + number % 9), shade).save(folder / f"{number}.png")
        asked = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "What is in the picture?"}]
        answered = {"role": "assistant", "content": [{"type": "text", "text": name}]}
        lines.append(json.dumps({"messages": [{"role": "user", "content": asked}, answered]}))
    path = folder / f"skill-{start}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
