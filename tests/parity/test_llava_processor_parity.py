"""``LlavaNextProcessor`` against transformers' class of this name, and both in front of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from smolvlm_fms.errors import ConfigurationError, InputError, PromptError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.processing.llava_image import LlavaNextImageProcessor
from smolvlm_fms.processing.llava_next import LlavaNextProcessor
from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer
from tests.parity.test_llava_image_parity import peer as image_peer
from tests.parity.test_llava_image_parity import picture
from tests.tiny import build_tokenizer
from tests.tiny_llava import IMAGE_TOKEN, build_llava, load_llava_peer

MAJOR = int(transformers.__version__.split(".")[0])
SETTINGS = {
    "size": {"shortest_edge": 30},
    "crop_size": {"height": 30, "width": 30},
    "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]],
}
OWN = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
PICTURES = [picture(60, 43), picture(31, 100), picture(30, 30)]
TEXTS = ["<image>What is in the picture? <image>", "How many cats are there?", "One dog: <image>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), padding_side="left")


@pytest.fixture(scope="module")
def ours(folder: Path) -> LlavaNextProcessor:
    tokenizer = SmolVLMTokenizer.from_pretrained(folder)
    return LlavaNextProcessor(LlavaNextImageProcessor(**SETTINGS), tokenizer, **OWN)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return their_processor(folder, **OWN)


def their_processor(folder: Path, **own: Any) -> Any:
    from transformers import AutoTokenizer, LlavaNextProcessor

    # Without model_input_names, transformers 4 makes token_type_ids that no model here takes.
    tokenizer = AutoTokenizer.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    return LlavaNextProcessor(image_peer(**SETTINGS), tokenizer, chat_template=tokenizer.chat_template, **own)


def same(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        mine, other = ours[name], theirs[name]
        if isinstance(other, torch.Tensor):
            assert mine.dtype == other.dtype and torch.equal(mine, other), name
        else:
            assert len(mine) == len(other)
            for one, two in zip(mine, other, strict=True):
                np.testing.assert_array_equal(one, two, err_msg=name)


@pytest.mark.parametrize(
    "call",
    [
        {"text": TEXTS, "images": PICTURES, "padding": True, "return_tensors": "pt"},
        {"text": TEXTS, "images": [PICTURES[:2], [], PICTURES[2:]], "padding": True, "return_tensors": "pt"},
        {"text": TEXTS, "images": PICTURES, "padding": True, "return_tensors": "np"},
        {"text": TEXTS, "images": PICTURES},
        {"text": TEXTS[2], "images": PICTURES[2], "return_tensors": "pt"},
        {"text": TEXTS[1], "return_tensors": "pt"},
        {"text": TEXTS[1:2] * 2, "return_tensors": "pt"},
        pytest.param({"images": PICTURES, "return_tensors": "pt"},
                     marks=pytest.mark.skipif(MAJOR < 5, reason="transformers 4 cannot do without text")),
        {"text": TEXTS, "images": PICTURES, "padding": "max_length", "max_length": 300, "return_tensors": "pt"},
        {"text": TEXTS, "images": PICTURES, "text_kwargs": {"padding": True}, "return_tensors": "pt",
         "images_kwargs": {"do_normalize": False}},
        {"text": TEXTS, "images": PICTURES, "padding": True, "return_tensors": "pt", "padding_side": "right"},
        {"text": TEXTS, "images": PICTURES, "padding": True, "return_tensors": "pt", "return_mm_token_type_ids": True},
        pytest.param({"text": TEXTS, "images": PICTURES, "return_text_replacement_offsets": True},
                     marks=pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no replacement offsets")),
        {"text": TEXTS, "images": PICTURES, "do_pad": False},
    ],

)  # fmt: skip
def test_calls(ours: LlavaNextProcessor, theirs: Any, call: dict[str, Any]) -> None:
    images = call.get("images")
    flat = (
        [p for sample in images for p in sample] if isinstance(images, list) and isinstance(images[0], list) else None
    )
    # transformers wants nested pictures flat where a row has none.
    same(ours(**call), theirs(**(call if flat is None else call | {"images": flat})))


@pytest.mark.parametrize("strategy", ["default", "full", None])
@pytest.mark.parametrize("additional", [0, 1])
@pytest.mark.parametrize("patch", [7, 10])
def test_token_counts(folder: Path, strategy: str | None, additional: int, patch: int) -> None:
    own = {"patch_size": patch, "vision_feature_select_strategy": strategy, "num_additional_image_tokens": additional}
    theirs = their_processor(folder, **own)
    processor = LlavaNextProcessor(LlavaNextImageProcessor(**SETTINGS), SmolVLMTokenizer.from_pretrained(folder), **own)  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in generator.integers(1, 400, (300, 2))] + [(1, 4000), (4000, 1)]
    for height, width in sizes:
        expected = theirs._get_number_of_features(height, width, 30, 30) - (strategy == "default")
        assert processor.num_image_tokens((height, width), (30, 30)) == expected, (height, width)


def test_chat(ours: LlavaNextProcessor, theirs: Any) -> None:
    def turn(*parts: Any) -> list[dict[str, Any]]:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return [{"role": "user", "content": content}]

    chats = [turn(PICTURES[0], PICTURES[1], "Which one is red?"), turn("How many cats?"), turn(PICTURES[2], "What?")]
    for chat in (chats[0], chats):
        assert ours.apply_chat_template(chat, add_generation_prompt=True) == theirs.apply_chat_template(
            chat, add_generation_prompt=True
        )
        call = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        mine = ours.apply_chat_template(chat, **call, padding=True)
        padding: dict[str, Any] = {"processor_kwargs": {"padding": True}} if MAJOR >= 5 else {"padding": True}
        same(mine, theirs.apply_chat_template(chat, **call, **padding))


@pytest.mark.parametrize("family", ["granite", "mistral"])
def test_from_pictures_to_logits(tmp_path: Path, family: str) -> None:
    """A folder as users have it, loaded by both sides: the same inputs, the same logits, the same words."""
    folder = build_llava(build_tokenizer(tmp_path / family, padding_side="left"), family)
    image_peer(**SETTINGS).save_pretrained(folder)
    ours = LlavaNextProcessor.from_pretrained(folder)
    assert ours.image_token_id == IMAGE_TOKEN
    expected = ("full", 0) if family == "granite" else ("default", 1)
    assert (ours.vision_feature_select_strategy, ours.num_additional_image_tokens) == expected
    assert ours.patch_size == 7
    theirs = their_processor(
        folder, patch_size=7, vision_feature_select_strategy=expected[0], num_additional_image_tokens=expected[1]
    )
    call: dict[str, Any] = {"text": TEXTS, "images": PICTURES, "padding": True, "return_tensors": "pt"}
    inputs = ours(**call)
    same(inputs, theirs(**call))
    with torch.no_grad():
        logits = load_model(folder, scale_logits=False)(**inputs)
        expected_logits = load_llava_peer(folder)(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected_logits[real], rtol=0, atol=1e-4)
    ids = logits[:, -1:].argmax(-1)
    assert ours.post_process_image_text_to_text(ids) == theirs.post_process_image_text_to_text(ids)


def test_folders_go_both_ways(ours: LlavaNextProcessor, theirs: Any, tmp_path: Path) -> None:
    from transformers import LlavaNextProcessor as Theirs

    call: dict[str, Any] = {"text": TEXTS, "images": PICTURES, "padding": True, "return_tensors": "pt"}
    ours.save_pretrained(tmp_path / "ours")
    read = Theirs.from_pretrained(tmp_path / "ours", **({"backend": "pil"} if MAJOR >= 5 else {"use_fast": False}))
    same(ours(**call), read(**call))
    assert read.chat_template == ours.chat_template
    theirs.save_pretrained(tmp_path / "theirs")
    back = LlavaNextProcessor.from_pretrained(tmp_path / "theirs")
    same(back(**call), theirs(**call))
    assert back.chat_template == theirs.chat_template
    assert LlavaNextProcessor.from_pretrained(tmp_path / "theirs", patch_size=10).patch_size == 10


def test_what_does_not_fit_is_refused(ours: LlavaNextProcessor, folder: Path) -> None:
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (PromptError, "no picture was passed", {"text": TEXTS[0]}),
        (PromptError, r"3 <image>.*2 picture", {"text": TEXTS, "images": PICTURES[:2]}),
        (PromptError, r"row 1: 0 and 1", {"text": TEXTS, "images": [PICTURES[:2], PICTURES[:1], PICTURES[2:]]}),
        (PromptError, "after truncation", {"text": TEXTS, "images": PICTURES, "truncation": True, "max_length": 20}),
        (PromptError, "string", {"text": [3]}),
        (InputError, "Nothing to process", {}),
        (InputError, "video", {"text": "a", "videos": [[1]]}),
        (ConfigurationError, "Did you mean", {"text": "a", "image_grid_pinpoint": []}),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            ours(**call)
    tokenizer = SmolVLMTokenizer.from_pretrained(folder)
    with pytest.raises(ConfigurationError, match="patch_size"):
        LlavaNextProcessor(LlavaNextImageProcessor(**SETTINGS), tokenizer)(text=TEXTS[2], images=PICTURES[2])
    with pytest.raises(ConfigurationError, match="'default' or 'full'"):
        LlavaNextProcessor(None, tokenizer, vision_feature_select_strategy="cls")
    with pytest.raises(ConfigurationError, match="tokenizer"):
        LlavaNextProcessor()
    with pytest.raises(PromptError, match="video"):
        ours.apply_chat_template([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}])
