"""The checkpoint that the engine's benchmarks run on: SmolVLM-256M's shapes, random weights, a small tokenizer.

Speed does not depend on what the weights say, and this needs no download. Ours and every peer load the same folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "benchmark" / "256m"
PICTURE = FOLDER / "picture-2048.png"
SMALL_PICTURE = FOLDER / "picture-400.png"


def build(folder: Path = FOLDER) -> Path:
    """Write the folder unless it is there already (half a gigabyte, under build/)."""
    if (folder / "complete").exists():
        return folder
    import torch

    sys.path.insert(0, str(ROOT))
    from smolvlm_fms.config_presets import PRESETS
    from smolvlm_fms.fms_bridge.saving import save_pretrained
    from smolvlm_fms.model.smolvlm import SmolVLM
    from tests.tiny import build_processor_files, token_ids

    build_processor_files(folder, model_type="smolvlm", tile=512, longest_edge=2048, image_seq_len=64, video_edge=512)
    config = PRESETS["v2_256m_video_instruct"].updated(image_token_id=token_ids(folder)["<image>"])
    torch.manual_seed(0)
    model = SmolVLM(config)
    model.reset_parameters()
    model.post_init()
    save_pretrained(model, folder, dtype=torch.bfloat16)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    _picture(2048).save(PICTURE)
    _picture(400).save(SMALL_PICTURE)
    (folder / "complete").touch()
    return folder


def _picture(side: int):  # type: ignore[no-untyped-def]
    """Smooth colours and some noise: what a photo costs to decode and to resize."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:side, :side] / side
    channels = [np.sin(9 * x + 4 * y), np.cos(7 * x * y + 1), np.sin(5 * y - 3 * x)]
    noise = np.random.RandomState(0).randn(side, side, 3) * 4
    return Image.fromarray((np.stack(channels, -1) * 90 + 128 + noise).clip(0, 255).astype(np.uint8))


def tower_flops(folder: Path = FOLDER) -> float:
    """Floating-point operations of one tile through tower and connector (a multiplication and an addition are two)."""
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    width, hidden, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    linears = layers * patches * (4 * width * width + 2 * width * hidden)
    attention = layers * 2 * patches * patches * width
    embedding = patches * width * 3 * vision["patch_size"] ** 2
    connector = patches * width * text["hidden_size"]
    return 2.0 * (linears + attention + embedding + connector)
