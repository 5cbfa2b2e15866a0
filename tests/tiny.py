"""Tiny checkpoints' tokenizer and processor files, built in the test that needs them.

    folder = build_tokenizer(tmp_path)                  # tokenizer.json and the files beside it
    folder = build_processor_files(tmp_path)            # the same, and preprocessor_config.json, processor_config.json
    ids = token_ids(folder)                             # {"<image>": 449, …}

The tokenizer has SmolVLM's shape (byte-level BPE, single digits, SmolLM2's control tokens at 0…16, picture tokens
behind the words) and a few hundred tokens. It is the same on every call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PICTURE_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

CONTROL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
]  # fmt: skip
PICTURE_TOKENS = [
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<end_of_utterance>",
]
NAMED_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
CORPUS = [
    "User: What is in the picture?\nAssistant: The picture shows a red circle and a blue square.\n\n",
    "You are provided the following series of twelve frames from a 0:00:10 [H:MM:SS] video.\n\nFrame from 00:01:",
    "How many cats are there? There are three cats on the table, and one dog under it.\n\n",
    "The capital of France is Paris. Can you describe this image in detail, please?\n\n",
    "def main():\n    return 42\n\n\nprint('hello, world!')  # comment\n",
]


def build_tokenizer(
    folder: str | Path,
    *,
    words: int = 420,
    padding_side: str | None = None,
    template: str | None = PICTURE_TEMPLATE,
    transformers_major: int = 5,
    extra_tokens: tuple[str, ...] = (),
) -> Path:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template into ``folder``.

    words: size of the vocabulary below the picture tokens (at least 273: bytes and control tokens).
    padding_side: written to the configuration when given; released SmolVLM files leave it out.
    transformers_major: 4 writes ``added_tokens_decoder`` and the template inside ``chat_template.json``, as the first
        releases have them; 5 writes ``extra_special_tokens`` and ``chat_template.jinja``.
    extra_tokens: further special tokens at the end (Docling's ``<doctag>`` and the like).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train(words, extra_tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<end_of_utterance>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "processor_class": "SmolVLMProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "truncation_side": "left",
        "unk_token": "<|endoftext|>",
    }
    if padding_side is not None:
        config["padding_side"] = padding_side
    if transformers_major >= 5:
        config |= {"extra_special_tokens": NAMED_TOKENS, **NAMED_TOKENS}
    else:
        config |= {"processor_class": "Idefics3Processor", "tokenizer_class": "GPT2Tokenizer", "vocab_size": words}
        config["added_tokens_decoder"] = {
            str(index): {
                "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special,
            }
            for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
        }  # fmt: skip
    _write(folder / "tokenizer_config.json", config)
    names = ("additional_special_tokens", "bos_token", "eos_token", "pad_token", "unk_token")
    _write(folder / "special_tokens_map.json", {name: config[name] for name in names})
    if template is not None and transformers_major >= 5:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template is not None:
        _write(folder / "chat_template.json", {"chat_template": template})
    return folder


def build_processor_files(
    folder: str | Path,
    *,
    model_type: str = "smolvlm",
    tile: int = 32,
    longest_edge: int = 128,
    image_seq_len: int = 4,
    video_edge: int = 32,
    max_frames: int = 8,
    fps: float = 1,
    **tokenizer: Any,
) -> Path:
    """``build_tokenizer`` and the processors' configuration, as released folders have them.

    tile: side of a tile in pixels; longest_edge: the picture's longest side after the first resize;
    image_seq_len: ``<image>`` tokens a tile; video_edge, max_frames, fps: the ``video_sampling`` block
    (SmolVLM2 only, so ``model_type="smolvlm"``).
    """
    folder = build_tokenizer(folder, **tokenizer)
    family = "SmolVLM" if model_type == "smolvlm" else "Idefics3"
    preprocessor: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": f"{family}ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": tile},
        "processor_class": f"{family}Processor",
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": longest_edge},
    }
    if model_type == "smolvlm":
        preprocessor["video_sampling"] = {
            "fps": fps,
            "max_frames": max_frames,
            "video_size": {"longest_edge": video_edge},
        }
    _write(folder / "preprocessor_config.json", preprocessor)
    _write(folder / "processor_config.json", {"image_seq_len": image_seq_len, "processor_class": f"{family}Processor"})
    return folder


def token_ids(folder: str | Path) -> dict[str, int]:
    """Content of every added token of the folder's tokenizer.json and its id."""
    content = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in content["added_tokens"]}


def _train(words: int, extra_tokens: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*PICTURE_TOKENS, *extra_tokens)]
    )
    return tokenizer


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
