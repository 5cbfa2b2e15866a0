"""The bundled checkpoint: it sees, transformers gets the same logits, and its pictures get their answers."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "bundled"
ASSETS = ROOT / "src" / "smolvlm_fms" / "assets"
sys.path.insert(0, str(RECIPE))

import conversations  # noqa: E402
import skills  # noqa: E402
from stream import normalise  # noqa: E402
from wordings import Turn  # noqa: E402

import smolvlm_fms as sv  # noqa: E402
from smolvlm_fms.cli import app  # noqa: E402
from smolvlm_fms.cli.demo import ask  # noqa: E402
from smolvlm_fms.fms_bridge.loading import load_model  # noqa: E402
from smolvlm_fms.training import IGNORE  # noqa: E402

SEEING = {
    "single": {"shape", "choice", "colour", "size", "left or right", "top or bottom"},
    "pair": {"colour of", "shape of", "side", "side colour", "bigger"},
    "count": {"count", "count of kind", "colour of all", "shape of all"},
    "chart": {"tallest colour", "shortest colour", "biggest slice", "line direction", "line colour", "count of bars"},
    "two": {"shape in picture", "colour in picture", "picture of bigger", "picture with"},
    "video": {"direction", "moves", "colour"},
}
"""Skill (those that need neither fonts nor art) → questions whose answers a grey picture seldom gives."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(ASSETS / "demo", dtype=torch.float32)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> conversations.Writer:
    work = tmp_path_factory.mktemp("work")
    (work / "tokenizer.json").write_text((ASSETS / "demo" / "tokenizer.json").read_text())
    return conversations.Writer(work)


def right(model: Any, writer: conversations.Writer, pixels_NHWC: torch.Tensor, turn: Turn, video: bool) -> bool:
    """Whether greedy decoding gives exactly the answer: each of its tokens is the likeliest after those before it."""
    ids, labels = writer.write([turn], len(pixels_NHWC), fps=24.0 if video else None)
    with torch.no_grad():
        logits = model(input_ids=ids[None], pixel_values=normalise(pixels_NHWC)[None])[0]
    wanted = labels[1:] != IGNORE
    return bool((logits[:-1].argmax(-1) == labels[1:])[wanted].all())


@pytest.mark.parametrize("skill", SEEING)
def test_it_sees(model: Any, writer: conversations.Writer, skill: str) -> None:
    world = skills.World(held_out=True, fonts=[], words=[], emoji={})
    seen = blind = asked = 0
    for seed in range(90_000, 90_200):
        sample = skills.make(world, seed, skill)
        turn = next((turn for turn in sample.turns if turn.about in SEEING[skill]), None)
        if turn is None:
            continue
        pixels = torch.from_numpy(sample.pixels)
        if asked == 40:
            break
        asked += 1
        seen += right(model, writer, pixels, turn, sample.is_video)
        blind += right(model, writer, torch.full_like(pixels, 128), turn, sample.is_video)
    assert asked == 40
    assert seen >= blind + 0.2 * asked, f"{seen} of {asked} right, {blind} with a grey picture: it guesses"


YES_OR_NO = {
    "single": {"is it", "is colour"}, "pair": {"relation", "is there"}, "chart": {"taller", "bigger slice"},
    "video": {"is direction"},
}  # fmt: skip
"""Skill → claims about the picture: looking something up by its name and then comparing."""


@pytest.mark.parametrize("skill", YES_OR_NO)
def test_it_says_no_as_rightly_as_yes(model: Any, writer: conversations.Writer, skill: str) -> None:
    world = skills.World(held_out=True, fonts=[], words=[], emoji={})
    asked, correct = Counter[str](), Counter[str]()
    for seed in range(95_000, 95_150):
        sample = skills.make(world, seed, skill, strength=0.0)
        for turn in sample.turns:
            if turn.about in YES_OR_NO[skill]:
                asked[turn.answer] += 1
                correct[turn.answer] += right(model, writer, torch.from_numpy(sample.pixels), turn, sample.is_video)
    assert min(asked["yes"], asked["no"]) >= 15
    assert all(correct[answer] >= 0.85 * asked[answer] for answer in ("yes", "no")), (asked, correct)


def test_the_committed_results_are_this_models() -> None:
    """The scores that RESULTS.json, the card and the README state, asked again in two whole tests."""
    committed = json.loads((RECIPE / "RESULTS.json").read_text())["skills"]
    done = CliRunner().invoke(app, ["eval", "demo", "--skills", "shapes,flags_unseen_set", "--no-blank", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])["skills"]
    for name in ("shapes", "flags_unseen_set"):
        assert found[name]["score"] == pytest.approx(committed[name]["score"], abs=0.03)


def test_the_bundled_pictures_get_their_answers() -> None:
    table = json.loads((ASSETS / "pictures" / "questions.json").read_text())
    assert len({one["images"][0] for one in table}) >= 8
    assert any(len(one["images"]) == 2 for one in table), "two pictures to compare"
    assert any(one.get("video") for one in table), "a video"
    vlm = sv.load("demo")
    for one in table:
        answer, correct = ask(vlm, ASSETS / "pictures", one)
        assert correct, (one, answer.text)


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
