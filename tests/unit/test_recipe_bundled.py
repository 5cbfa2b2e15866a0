"""The bundled model's recipe: its pictures say what its answers say, and nothing held out is ever trained on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "bundled"
sys.path.insert(0, str(RECIPE))

import conversations  # noqa: E402
import cut_tokenizer  # noqa: E402
import draw  # noqa: E402
import skills  # noqa: E402
import wordings  # noqa: E402

from smolvlm_fms.training import IGNORE  # noqa: E402

DEMO = ROOT / "src" / "smolvlm_fms" / "assets" / "demo"


def emoji_art(level: int) -> np.ndarray:
    art = np.zeros((160, 160, 4), np.uint8)
    art[20:140, 20:140] = (level, 90, 30, 255)
    return art


def world(held: bool = False) -> skills.World:
    art = {"dog": [emoji_art(200)], "cat": [emoji_art(120)], "bee": [emoji_art(60)], "car": [emoji_art(20)]}
    return skills.World(held, fonts=[], words=["house"], emoji=art)


@pytest.mark.parametrize("skill", ["single", "pair", "count", "emoji"])
def test_the_same_seed_gives_the_same_sample(skill: str) -> None:
    first, again, other = (skills.make(world(), seed, skill) for seed in (5, 5, 6))
    assert first.turns == again.turns and np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)
    assert first.pixels.shape == (128, 128, 3) and first.pixels.dtype == np.uint8
    assert first.kinds.shape == first.colours.shape == (64,)


def shown(sample: skills.Sample) -> set[tuple[str, str]]:
    """Pairs of shape and colour that the dense targets report."""
    pairs = zip(sample.kinds.tolist(), sample.colours.tolist(), strict=True)
    return {(skills.KINDS[kind], draw.COLOURS[colour]) for kind, colour in pairs if kind}


def test_held_out_pairs_are_never_trained_on_and_always_tested() -> None:
    seen: Counter[bool] = Counter()
    for seed in range(150):
        for skill in ("single", "pair", "count"):
            assert not shown(skills.make(world(), seed, skill)) & skills.COMBOS_HELD_OUT
        for pair in shown(skills.make(world(held=True), seed, "single")):
            seen[pair in skills.COMBOS_HELD_OUT] += 1
    assert seen[False] == 0 and seen[True] > 100


def test_answers_are_what_the_picture_shows() -> None:
    checked: Counter[str] = Counter()
    for seed in range(300):
        sample = skills.make(world(), seed, "single")
        ((shape, colour),) = shown(sample)
        for question, answer, about in sample.turns:
            checked[about] += 1
            if about == "colour":
                assert answer == colour, question
            elif about in ("shape", "choice"):
                assert answer == shape, question
            elif about == "is colour":
                assert answer == wordings.yes_no(f" {colour}?" in question), question
            elif about == "description":
                assert f"{colour} {shape}" in answer
            elif about in ("left or right", "top or bottom"):
                middle = np.nonzero(sample.kinds.reshape(8, 8))[int(about == "left or right")].mean()
                assert (answer in ("left", "top")) == (middle < 3.5), question
            elif about == "place":
                rows, columns = np.nonzero(sample.kinds.reshape(8, 8))
                centre = (columns.mean() + 0.5) * 32, (rows.mean() + 0.5) * 32
                assert skills.place_of(*centre) in (answer, None), (question, centre)
    assert (
        min(
            checked[name]
            for name in ("colour", "is colour", "shape", "choice", "description", "place", "left or right")
        )
        > 20
    )


def test_counts_agree_with_the_picture() -> None:
    for seed in range(80):
        rng = Random(seed)
        picture, turns = skills.count(world(), rng)
        totals = Counter(picture.kinds)
        shades = Counter(picture.colours)
        for question, answer, about in turns:
            if about == "count":
                assert int(answer) == len(picture.kinds)
            elif about == "count of kind":
                assert int(answer) == next(n for shape, n in totals.items() if f" {shape}" in question), question
            elif about == "count of colour":
                assert int(answer) == next(n for shade, n in shades.items() if f" {shade} " in question), question


def test_yes_and_no_are_both_right_about_half_the_time() -> None:
    said = Counter(
        answer
        for seed in range(400)
        for skill in ("single", "pair", "emoji")
        for _, answer, _ in skills.make(world(), seed, skill).turns
        if answer in ("yes", "no")
    )
    assert 0.35 < said["yes"] / said.total() < 0.65


def test_a_patch_is_named_for_the_object_that_covers_it() -> None:
    picture = draw.background(Random(0), {"red"})
    draw.add_shape(picture, "square", "red", (64, 64), 60, Random(0))
    objects, owner = picture.patches()
    assert objects == [None, ("square", "red")]
    grid = owner.reshape(8, 8)
    assert grid[1:3, 1:3].all() and not grid[5:].any() and not grid[:, 5:].any()


def test_places_have_a_margin_between_them() -> None:
    assert skills.place_of(20, 20) == "top left" and skills.place_of(128, 128) == "center"
    assert skills.place_of(240, 128) == "right" and skills.place_of(128, 240) == "bottom"
    assert skills.place_of(97, 128) is None


def test_the_cut_keeps_smollm2s_pieces_for_kept_words() -> None:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r"), ("x", "y")]
    kept = cut_tokenizer.needed_merges(["hello", " wor"], merges)
    assert kept == [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r")]
    letters = sorted(cut_tokenizer.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = cut_tokenizer.build([*letters, *dict.fromkeys(a + b for a, b in kept)], kept)
    assert tokenizer.encode("hello").tokens == ["hello"]
    assert tokenizer.encode("yellow").tokens == ["y", "e", "ll", "o", "w"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> conversations.Writer:
    work = tmp_path_factory.mktemp("work")
    (work / "tokenizer.json").write_text((DEMO / "tokenizer.json").read_text())
    return conversations.Writer(work)


def test_only_answers_are_learnt(writer: conversations.Writer) -> None:
    ids, labels = writer.write([("What is this?", "a dog"), ("What color is it?", "brown")])
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    learnt = writer.tokenizer.decode(labels[labels != IGNORE].tolist(), skip_special_tokens=False)
    assert learnt == " a dog<end_of_utterance> brown<end_of_utterance>"
    text = writer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text == (
        "<|im_start|>User:<fake_token_around_image><global-img>" + "<image>" * 16 + "<fake_token_around_image>"
        "What is this?<end_of_utterance>\nAssistant: a dog<end_of_utterance>"
        "\nUser: What color is it?<end_of_utterance>\nAssistant: brown<end_of_utterance>"
    )


@pytest.mark.parametrize("text", ["Käse, 漢字 und 🐶!", "  two  spaces\n\ttab", "SELECT * FROM x;", ""])
def test_any_text_can_be_written(writer: conversations.Writer, text: str) -> None:
    assert writer.tokenizer.decode(writer.tokenizer.encode(text).ids) == text


def test_every_answer_word_of_the_recipe_is_known(writer: conversations.Writer) -> None:
    for answer in (*draw.SHAPES, *draw.COLOURS, *json.loads((RECIPE / "emoji_names.json").read_text())):
        assert len(writer.tokenizer.encode(f" {answer}").ids) <= 4, answer
