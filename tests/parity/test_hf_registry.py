"""``register()``: the code of transformers' own SmolVLM page, unchanged but for the model folder, with equal text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smolvlm_fms.hf import FmsForConditionalGeneration, register, unregister
from smolvlm_fms.hf.processors import FmsProcessor
from smolvlm_fms.hf.reference import reference_processor
from tests.tiny_models import build_checkpoint, load_peer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("registry"), "smolvlm", processor=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


def conversations(picture: str) -> list[list[dict[str, Any]]]:
    """Of the page: one picture, two pictures, pure text."""
    image = {"type": "image", "path": picture}
    return [
        [{"role": "user", "content": [image, {"type": "text", "text": "Describe this image."}]}],
        [{"role": "user", "content": [image, image, {"type": "text", "text": "What is written in the pictures?"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "who are you?"}]}],
    ]


def generate(processor: Any, model: Any, conversation: Any) -> list[str]:
    """The page's own lines."""
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, dtype=torch.float32)
    generated_ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return list(processor.batch_decode(generated_ids, skip_special_tokens=True))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_pages_code_gives_equal_text(registered: None, folder: Path, picture: str, which: int) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(model, FmsForConditionalGeneration)
    assert isinstance(processor, FmsProcessor)
    conversation = conversations(picture)[which]
    text = generate(processor, model, conversation)
    unregister()
    assert text == generate(reference_processor(folder), load_peer(folder), conversation)


def test_a_mixed_batch_gives_each_rows_own_text(registered: None, folder: Path, picture: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    batch = conversations(picture)
    inputs = processor.apply_chat_template(
        batch,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        processor_kwargs={"padding_side": "left"},
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    length = inputs["input_ids"].shape[1]
    together = processor.batch_decode(ids[:, length:], skip_special_tokens=True)
    for conversation, text in zip(batch, together, strict=True):
        alone = generate(processor, model, conversation)[0]
        assert alone.endswith(text)


def test_the_pipeline_runs_on_ours(registered: None, folder: Path, picture: str) -> None:
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
    assert isinstance(pipe.model, FmsForConditionalGeneration)
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.open(picture)},
                                             {"type": "text", "text": "Describe this image."}]}]  # fmt: skip
    result = pipe(text=messages, max_new_tokens=12, return_full_text=False, generate_kwargs={"do_sample": False})
    full = generate(pipe.processor, pipe.model, conversations(picture)[0])[0]
    assert full.endswith(result[0]["generated_text"])


def test_image_and_video_factories_give_ours(registered: None, folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoVideoProcessor

    assert type(AutoImageProcessor.from_pretrained(folder)).__module__.startswith("smolvlm_fms.")
    assert type(AutoVideoProcessor.from_pretrained(folder)).__module__.startswith("smolvlm_fms.")


def test_unregistering_gives_theirs_back(folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    before = AutoProcessor.__dict__["from_pretrained"]
    register()
    register()  # twice is once
    unregister()
    unregister()
    assert AutoProcessor.__dict__["from_pretrained"] is before
    assert type(AutoModelForImageTextToText.from_pretrained(folder)).__module__.startswith("transformers.")
    assert type(AutoImageProcessor.from_pretrained(folder)).__module__.startswith("transformers.")
