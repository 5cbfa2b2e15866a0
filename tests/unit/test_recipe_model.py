"""The bundled checkpoint: it sees, transformers gets the same logits, and its pictures get their answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "bundled"
ASSETS = ROOT / "src" / "smolvlm_fms" / "assets"
sys.path.insert(0, str(RECIPE))

import conversations  # noqa: E402
import held_out  # noqa: E402
import skills  # noqa: E402
from wordings import Turn  # noqa: E402

from smolvlm_fms.fms_bridge.loading import load_model  # noqa: E402

RESULTS = json.loads((RECIPE / "RESULTS.json").read_text())["skills"]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(ASSETS / "demo", dtype=torch.float32)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> conversations.Writer:
    work = tmp_path_factory.mktemp("work")
    (work / "tokenizer.json").write_text((ASSETS / "demo" / "tokenizer.json").read_text())
    return conversations.Writer(work)


def scores(model: Any, writer: conversations.Writer, test: str, number: int) -> tuple[float, float]:
    """Share of held-out questions answered exactly, with the picture and with a grey one (no fonts, no art needed)."""
    world = skills.World(held_out=True, fonts=[], words=[], emoji={})
    skill, about = held_out.TESTS[test]
    asked = []
    for seed in range(90_000, 90_000 + 4 * number):
        sample = skills.make(world, seed, skill)
        asked += [(sample.pixels, turn) for turn in sample.turns if turn.about in about][:1]
    pixels = torch.from_numpy(np.stack([p for p, _ in asked[:number]]))
    turns = [turn for _, turn in asked[:number]]
    seen = held_out.right(model, writer, pixels, turns)
    blind = held_out.right(model, writer, torch.full_like(pixels, 128), turns)
    return sum(seen) / number, sum(blind) / number


@pytest.mark.parametrize("test", ["shape", "colour", "size", "side", "count"])
def test_it_sees(model: Any, writer: conversations.Writer, test: str) -> None:
    seen, blind = scores(model, writer, test, 60)
    assert seen >= RESULTS[test]["score"] - 0.15, "held-out accuracy is far below what RESULTS.json reports"
    assert seen >= blind + 0.2, "a blank picture does nearly as well: it guesses"


def test_the_bundled_pictures_get_their_answers(model: Any, writer: conversations.Writer) -> None:
    table = json.loads((ASSETS / "pictures" / "questions.json").read_text())
    assert len({one["images"][0] for one in table}) >= 8
    for one in table:
        (name,), (answer,) = one["images"], one["answers"]
        image = Image.open(ASSETS / "pictures" / name).convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image))[None]
        assert held_out.right(model, writer, pixels, [Turn(one["question"], answer, "")]) == [True], one


def test_transformers_loads_it_and_agrees(model: Any, writer: conversations.Writer) -> None:
    from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration

    theirs = SmolVLMForConditionalGeneration.from_pretrained(ASSETS / "demo", dtype=torch.float32).eval()
    input_ids = writer.write([("What is this?", "dog")])[0][None]
    pixels = torch.rand(1, 1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        expected = theirs(input_ids=input_ids, pixel_values=pixels).logits
        ours = model(input_ids=input_ids, pixel_values=pixels)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "demo")
    text = writer.tokenizer.decode(input_ids[0].tolist(), skip_special_tokens=False)
    assert tokenizer(text)["input_ids"] == input_ids[0].tolist()
    template = (ASSETS / "demo" / "chat_template.json").read_text()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = tokenizer.apply_chat_template(
        chat, chat_template=json.loads(template)["chat_template"], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>User:<image>What is this?<end_of_utterance>\nAssistant:"


def test_it_fits_in_the_package() -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 40e6
