"""Write the bundled checkpoint: weights in bfloat16 and the files that make a folder which transformers loads, too.

python recipes/bundled/export.py --run runs/bundled --out src/smolvlm_fms/assets/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversations import TOKENS_PER_TILE
from cut_tokenizer import SPECIAL
from draw import TILE
from sources import DEFAULT_WORK

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The format of the released SmolVLM checkpoints (Apache-2.0)."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_processor(work: Path, folder: Path, ids: dict[str, int]) -> None:
    """Tokenizer, image processor, processor, chat template and generation settings."""
    shutil.copyfile(work / "tokenizer.json", folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "SmolVLMProcessor",
        "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
        "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        "extra_special_tokens": {
            "fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        },
        "added_tokens_decoder": {
            str(ids[token]): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                              "single_word": False, "special": True} for token in SPECIAL
        },
    })  # fmt: skip
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor",
        "do_convert_rgb": True, "do_image_splitting": False, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1,
        "rescale_factor": 1 / 255, "max_image_size": {"longest_edge": TILE}, "size": {"longest_edge": TILE},
        "video_sampling": {"fps": 1, "max_frames": 16, "video_size": {"longest_edge": TILE}},
    })  # fmt: skip
    write_json(
        folder / "processor_config.json", {"processor_class": "SmolVLMProcessor", "image_seq_len": TOKENS_PER_TILE}
    )
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_json(folder / "generation_config.json", {
        "bos_token_id": ids["<|im_start|>"], "eos_token_id": ids["<end_of_utterance>"],
        "pad_token_id": ids["<|im_end|>"], "do_sample": False, "max_new_tokens": 32,
    })  # fmt: skip


def export(model: nn.Module, work: Path, folder: Path) -> None:
    """Write `model` as a checkpoint folder."""
    from smolvlm_fms.fms_bridge.saving import save_pretrained

    from shape import tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_pretrained(model, folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").chmod(0o644)
    read = tokenizer(work)
    write_processor(work, folder, {token: read.token_to_id(token) for token in SPECIAL})


def latest(run: Path, module: nn.Module, wanted: tuple[str, ...] = ("",)) -> int:
    """Load the averaged weights of the run's newest checkpoint, those parts that are wanted; returns its step."""
    from smolvlm_fms.training.checkpoint import CheckpointFolder

    checkpoints = CheckpointFolder(run / "checkpoints", 99)
    step = checkpoints.steps()[-1]
    state = {}
    for name, tensor in checkpoints.tensors(step).items():
        kind, _, rest = name.partition("smolvlm.")  # inside Sighted, perhaps inside DistributedDataParallel
        if kind.startswith("average/") and rest and rest.startswith(wanted):
            state[rest] = tensor
    missing, unexpected = module.load_state_dict(state, strict=False)
    left = [n for n in missing if n.startswith(wanted) and not n.startswith("text_model.head")]  # tied
    if left or unexpected:
        raise SystemExit(f"{run} holds another model: missing {left}, unexpected {unexpected}")
    return step


def main() -> None:
    from train import build

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--run", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--out", type=Path, default=Path("src/smolvlm_fms/assets/demo"))
    args = parser.parse_args()
    model = build(args.work)
    step = latest(args.run, model)
    export(model, args.work, args.out)
    print(f"step {step} of {args.run} → {args.out}")


if __name__ == "__main__":
    main()
