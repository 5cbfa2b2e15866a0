"""Whole dictionaries against transformers' SmolVLMProcessor and Idefics3Processor, with Pillow's pixels.

transformers builds its SmolVLMProcessor with a video processor only, and that needs torchvision. Here it gets a
stand-in that is never called, so that everything but videos is compared wherever the tests run; ``test_video_parity``
has videos.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from smolvlm_fms.processing.processor import SmolVLMProcessor
from smolvlm_fms.processing.prompt import video_prompt
from smolvlm_fms.processing.video_decode import VideoMetadata
from tests.tiny import PICTURE_TEMPLATE, build_processor_files

MAJOR = int(transformers.__version__.split(".")[0])
P = "<image>"

try:
    from transformers.models.smolvlm import processing_smolvlm
except ImportError:
    # transformers 4 cannot even import the module without torchvision.
    if MAJOR >= 5:
        raise
    FAMILIES = ["idefics3"]
else:
    FAMILIES = ["smolvlm", "idefics3"]

    class PeerSmolVLM(processing_smolvlm.SmolVLMProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
            return type(argument)


def peer_image_processor(folder: Path, family: str) -> Any:
    """transformers' Pillow back end: a class of its own in 5, the plain class in 4."""
    name = "SmolVLMImageProcessor" if family == "smolvlm" else "Idefics3ImageProcessor"
    for module in (f"image_processing_pil_{family}", f"image_processing_{family}"):
        try:
            found = importlib.import_module(f"transformers.models.{family}.{module}")
        except ImportError:
            continue
        for each in (f"{name}Pil", name):
            if hasattr(found, each):
                return getattr(found, each).from_pretrained(folder)
    raise AssertionError("transformers has no Pillow image processor")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SmolVLMProcessor, Any]:
    folder = build_processor_files(tmp_path_factory.mktemp("pair"), model_type=request.param, padding_side="left")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    images = peer_image_processor(folder, request.param)
    if request.param == "smolvlm":
        videos = SimpleNamespace(num_frames=None, fps=None, model_input_names=[])
        theirs: Any = PeerSmolVLM(images, tokenizer, videos, image_seq_len=4, chat_template=PICTURE_TEMPLATE)
    else:
        theirs = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=PICTURE_TEMPLATE)
    return SmolVLMProcessor.from_pretrained(folder), theirs


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


WIDE, TALL, SMALL = picture(50, 80), picture(100, 30, 1), picture(20, 20, 2)


def same(ours: Any, theirs: Any) -> None:
    if MAJOR < 5:  # the same keys in another order, and two that no model takes
        theirs = {name: theirs[name] for name in ours if name in theirs}
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        got = ours[name]
        if isinstance(expected, torch.Tensor | np.ndarray):
            assert type(got) is type(expected) and got.shape == expected.shape and got.dtype == expected.dtype, name
            assert np.array_equal(np.asarray(got), np.asarray(expected)), name
        elif name.startswith("pixel"):
            for one, other in zip(got, expected, strict=True):
                assert np.array_equal(np.asarray(one), np.asarray(other)), name
        else:
            assert got == expected, name


CALLS: dict[str, dict[str, Any]] = {
    "one picture": {"text": f"{P}What?", "images": WIDE, "return_tensors": "pt"},
    "lists": {"text": [f"{P}What?"], "images": [[WIDE]]},
    "arrays": {"text": [f"{P}What?"], "images": [[WIDE]], "return_tensors": "np"},
    "several": {"text": [f"{P}a{P}", P], "images": [[WIDE, TALL], [SMALL]], "return_tensors": "pt", "padding": True},
    "a row without": {"text": ["none", P], "images": [[], [SMALL]], "return_tensors": "pt", "padding": True},
    "text alone": {"text": ["hello", "hello you"], "return_tensors": "pt", "padding": True},
    "pictures alone": {"images": [[WIDE, TALL]], "return_tensors": "pt"},
    "untiled": {"text": P, "images": WIDE, "images_kwargs": {"do_image_splitting": False}, "return_tensors": "pt"},
    "another size": {"text": P, "images": WIDE, "size": {"longest_edge": 64}, "return_tensors": "pt"},
    "bare pixels": {"text": P, "images": WIDE, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"},
    "right": {"text": [P, "b"], "images": [[WIDE], []], "return_tensors": "pt", "padding": True,
              "padding_side": "right"},
    "padded": {"text": P, "images": SMALL, "return_tensors": "pt", "padding": "max_length", "max_length": 99},
    "no masks": {"text": P, "images": SMALL, "text_kwargs": {"return_attention_mask": False}},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_whole_dictionaries(pair: tuple[SmolVLMProcessor, Any], name: str) -> None:
    ours, theirs = pair
    same(ours(**CALLS[name]), theirs(**CALLS[name]))


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no such arguments")
@pytest.mark.parametrize("name", ["one picture", "several", "right", "a row without"])
def test_token_types_and_offsets(pair: tuple[SmolVLMProcessor, Any], name: str) -> None:
    ours, theirs = pair
    call = CALLS[name] | {"return_mm_token_type_ids": True}
    same(ours(**call), theirs(**call))
    offsets = {key: value for key, value in CALLS[name].items() if key != "return_tensors"}
    offsets["return_text_replacement_offsets"] = True
    expected = theirs(**offsets)["text_replacement_offsets"]
    assert ours(**offsets)["text_replacement_offsets"] == expected


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_batches_of_any_make_up(pair: tuple[SmolVLMProcessor, Any], data: st.DataObject) -> None:
    ours, theirs = pair
    # transformers 4 takes sides of 1, 3 and 4 for numbers of channels.
    sides = st.integers(1 if MAJOR >= 5 else 5, 90)
    images = data.draw(
        st.lists(st.lists(st.builds(picture, sides, sides, st.integers(0, 9)), max_size=3), min_size=1, max_size=3)
    )
    words = st.text(alphabet="ab 1\n.é<>|", max_size=6)
    # Never empty: of nothing, transformers makes a tensor of floats.
    texts = ["a" + "".join(data.draw(words) + P for _ in row) + data.draw(words) for row in images]
    call: dict[str, Any] = {"text": texts, "return_tensors": "pt", "padding": True}
    if any(images):
        call["images"] = images
    same(ours(**call), theirs(**call))


CONVERSATION = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "image", "image": SMALL}, {"type": "text", "text": "And\n\nthis 12?"}]},
]


@pytest.mark.parametrize("prompt", [True, False])
def test_conversations_as_text(pair: tuple[SmolVLMProcessor, Any], prompt: bool) -> None:
    ours, theirs = pair
    for conversation in (CONVERSATION, [CONVERSATION, CONVERSATION[:1]]):
        expected = theirs.apply_chat_template(conversation, add_generation_prompt=prompt)
        assert ours.apply_chat_template(conversation, add_generation_prompt=prompt) == expected


def test_conversations_as_inputs(pair: tuple[SmolVLMProcessor, Any]) -> None:
    ours, theirs = pair
    call: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    same(
        ours.apply_chat_template(CONVERSATION, return_tensors="pt", **call),
        theirs.apply_chat_template(CONVERSATION, return_tensors="pt", **call),
    )
    batch = [CONVERSATION, CONVERSATION[:1]]
    extra: dict[str, Any] = {"processor_kwargs": {"padding": True}} if MAJOR >= 5 else {"padding": True}
    same(
        ours.apply_chat_template(batch, return_tensors="pt", **call, **extra),
        theirs.apply_chat_template(batch, return_tensors="pt", **call, **extra),
    )
    ids = theirs.apply_chat_template(batch, tokenize=True, add_generation_prompt=True)
    assert ours.apply_chat_template(batch, tokenize=True, add_generation_prompt=True) == ids


def test_assistant_masks(pair: tuple[SmolVLMProcessor, Any]) -> None:
    ours, theirs = pair
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% elif m['role'] == 'assistant' %}{% generation %}{{ p['text'] }}{% endgeneration %}"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    call: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    expected = theirs.apply_chat_template(CONVERSATION, template, **call)
    got = ours.apply_chat_template(CONVERSATION, template, **call)
    if MAJOR >= 5:  # 4.57 loses the place of words behind a picture
        assert [list(row) for row in got["assistant_masks"]] == [list(row) for row in expected["assistant_masks"]]
    assert list(got["input_ids"]) == list(expected["input_ids"])


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "  {% if true %}\n  {{ messages[0]['role'] }}\n  {% endif %}\n{{ bos_token }}{{ eos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1) | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ tools }}{{ documents }}",
])  # fmt: skip
def test_template_dialect(pair: tuple[SmolVLMProcessor, Any], template: str) -> None:
    ours, theirs = pair
    conversation = [{"role": "user", "content": [{"type": "text", "text": "<é>"}]}] * 3
    assert ours.apply_chat_template(conversation, template) == theirs.apply_chat_template(conversation, template)


@pytest.mark.parametrize("spaces", ["", "  "])
def test_continuing_the_final_message(pair: tuple[SmolVLMProcessor, Any], spaces: str) -> None:
    ours, theirs = pair
    conversation = [{"role": "assistant", "content": [{"type": "text", "text": f"It is{spaces}"}]}]
    trimming = "{% for m in messages %}{{ m['content'][0]['text'] | trim }}!{% endfor %}"
    for template in (None, trimming):
        call: dict[str, Any] = {"chat_template": template, "continue_final_message": True}
        expected = theirs.apply_chat_template(conversation, **call)
        assert ours.apply_chat_template(conversation, **call) == expected


@given(
    stamps=st.lists(st.floats(0, 7000), min_size=1, max_size=5).map(sorted),
    duration=st.none() | st.floats(0, 100_000),
    length=st.integers(1, 5),
)
def test_video_prompts(stamps: list[float], duration: float | None, length: int) -> None:
    """transformers' own text for one video, taken from the method that writes it."""
    if MAJOR < 5:
        pytest.skip("transformers 4 writes it inside a longer method; test_video_parity compares that")
    holder: Any = SimpleNamespace(
        image_seq_len=length, image_token=P, fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )  # fmt: skip
    # At a rate of 1 the frames' numbers are their times.
    metadata = VideoMetadata(total_num_frames=9999, fps=1.0, duration=duration, frames_indices=stamps)  # type: ignore[arg-type]
    inputs = {"pixel_values": torch.zeros(1, len(stamps), 1, 1, 1), "video_metadata": [metadata]}
    expected = processing_smolvlm.SmolVLMProcessor.replace_video_token(holder, inputs, 0)
    assert video_prompt(stamps, duration, len(stamps), length) == expected
    assert (
        processing_smolvlm.DEFAULT_CHAT_TEMPLATE
        == importlib.import_module("smolvlm_fms.processing.chat_template").VIDEO_TEMPLATE
    )


def test_what_we_save_is_what_they_read(pair: tuple[SmolVLMProcessor, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    ours.save_pretrained(tmp_path)
    images = peer_image_processor(tmp_path, ours.family)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    if ours.family == "idefics3":
        again: Any = Idefics3Processor.from_pretrained(tmp_path)
        assert again.chat_template == theirs.chat_template and again.image_seq_len == 4
        again.image_processor = images  # AutoImageProcessor may prefer the tensor back end
    else:
        again = PeerSmolVLM(images, tokenizer, theirs.video_processor, image_seq_len=4)
    same(again(**CALLS["several"]), ours(**CALLS["several"]))
    theirs_folder = tmp_path / "theirs"
    theirs.tokenizer.save_pretrained(theirs_folder)
    theirs.image_processor.save_pretrained(theirs_folder)
    if ours.family == "idefics3":
        theirs.save_pretrained(theirs_folder)
    back = SmolVLMProcessor.from_pretrained(theirs_folder, image_seq_len=4, family=ours.family)
    same(back(**CALLS["several"]), ours(**CALLS["several"]))
