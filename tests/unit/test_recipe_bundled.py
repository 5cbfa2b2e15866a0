"""The bundled model's recipe: its pictures say what its answers say, and nothing held out is ever trained on."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "bundled"
sys.path.insert(0, str(RECIPE))

import charts  # noqa: E402
import conversations  # noqa: E402
import cut_tokenizer  # noqa: E402
import draw  # noqa: E402
import shape  # noqa: E402
import sighted  # noqa: E402
import skills  # noqa: E402
import symbols  # noqa: E402
import train  # noqa: E402
import warmup  # noqa: E402
import wordings  # noqa: E402
from stream import normalise  # noqa: E402

from smolvlm_fms.config import VisionConfig  # noqa: E402
from smolvlm_fms.model.smolvlm import SmolVLM  # noqa: E402
from smolvlm_fms.modules.vision import SiglipTower  # noqa: E402
from smolvlm_fms.training import IGNORE  # noqa: E402

DEMO = ROOT / "src" / "smolvlm_fms" / "assets" / "demo"


def emoji_art(level: int) -> np.ndarray:
    art = np.zeros((160, 160, 4), np.uint8)
    art[20:140, 20:140] = (level, 90, 30, 255)
    return art


def world(held: bool = False) -> skills.World:
    art = {"dog": [emoji_art(200)], "cat": [emoji_art(120)], "bee": [emoji_art(60)], "car": [emoji_art(20)]}
    flags = {name: [emoji_art(level)] for name, level in (("France", 9), ("Peru", 70), ("Japan", 150), ("Chile", 240))}
    ink = {name: np.eye(28, dtype=np.uint8)[None] * 255 for name in ("apple", "key", "sun", "tree")}
    return skills.World(held, fonts=[], words=["house"], emoji=art, flags=flags, sketches=ink)


@pytest.mark.parametrize("skill", ["single", "pair", "count", "emoji", "flag", "sketch", "chart", "two", "video"])
def test_the_same_seed_gives_the_same_sample(skill: str) -> None:
    first, again, other = (skills.make(world(), seed, skill) for seed in (5, 5, 6))
    assert first.turns == again.turns and np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)
    pictures = {"two": 2, "video": 3}.get(skill, 1)
    assert first.pixels.shape == (pictures, 128, 128, 3) and first.pixels.dtype == np.uint8
    assert first.targets.shape == (pictures, len(draw.FIELDS), 64) and first.targets.dtype == np.int64
    unseen = skills.make(world(), 5, skill, pixels=False)
    assert unseen.turns == first.turns and np.array_equal(unseen.targets, first.targets)


def shown(sample: skills.Sample) -> set[tuple[str, str]]:
    """Pairs of shape and colour that the dense targets report."""
    pairs = zip(sample.targets[:, 0].flatten().tolist(), sample.targets[:, 1].flatten().tolist(), strict=True)
    return {(skills.KINDS[kind], draw.COLOURS[colour]) for kind, colour in pairs if kind and colour >= 0}


def middle(targets: np.ndarray) -> tuple[float, float]:
    """Row and column of the middle of what is not background, in patches."""
    rows, columns = np.nonzero(targets[0].reshape(8, 8))
    return rows.mean(), columns.mean()


def test_held_out_pairs_are_never_trained_on_and_always_tested() -> None:
    seen: Counter[bool] = Counter()
    for seed in range(150):
        for skill in ("single", "pair", "count", "two", "video"):
            assert not shown(skills.make(world(), seed, skill)) & skills.COMBOS_HELD_OUT
        for pair in shown(skills.make(world(held=True), seed, "single")):
            seen[pair in skills.COMBOS_HELD_OUT] += 1
    assert seen[False] == 0 and seen[True] > 100


def test_answers_are_what_the_picture_shows() -> None:
    checked: Counter[str] = Counter()
    for seed in range(300):
        sample = skills.make(world(), seed, "single")
        if not shown(sample):  # a colour between the names is not asked about
            checked["nameless"] += 1
            assert not {turn.about for turn in sample.turns} & {"colour", "is colour", "description"}
            continue
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
                where = middle(sample.targets[0])[int(about == "left or right")]
                assert (answer in ("left", "top")) == (where < 3.5), question
            elif about == "place":
                row, column = middle(sample.targets[0])
                centre = (column + 0.5) * 32, (row + 0.5) * 32
                assert skills.place_of(*centre) in (answer, None), (question, centre)
    assert (
        min(
            checked[name]
            for name in ("colour", "is colour", "shape", "choice", "description", "place", "left or right", "nameless")
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


def test_bars_are_as_tall_as_the_answers_say() -> None:
    checked: Counter[str] = Counter()
    for seed in range(150):
        picture, turns = charts.bars(world(), Random(seed))
        cover = np.asarray(picture.cover)
        heights = {c: int(np.ptp(np.nonzero(cover == i)[0])) for i, c in enumerate(picture.colours, 1) if c}
        for question, answer, about in turns:
            checked[about] += 1
            if about == "count of bars":
                assert int(answer) == len(picture.kinds)
            elif about == "tallest colour":
                assert heights[answer] == max(heights.values()), question
            elif about == "shortest colour":
                assert heights[answer] == min(heights.values()), question
    assert min(checked[about] for about in ("count of bars", "tallest colour", "shortest colour", "chart kind")) > 20


def test_slices_cover_what_the_answers_say() -> None:
    for seed in range(60):
        picture, turns = charts.pie(world(), Random(seed))
        cover = np.bincount(np.asarray(picture.cover).ravel(), minlength=len(picture.kinds) + 1)[1:]
        area = dict(zip(picture.colours, cover, strict=True))
        for _, answer, about in turns:
            if about == "count of slices":
                assert int(answer) == len(area)
            elif about == "biggest slice":
                assert area[answer] == max(area.values())
            elif about == "smallest slice":
                assert area[answer] == min(area.values())


def test_lines_go_where_the_answers_say() -> None:
    for seed in range(30):
        picture, turns = charts.line(world(), Random(seed))
        rows, columns = np.nonzero(np.asarray(picture.cover))
        rises = np.polyfit(columns, rows, 1)[0] < 0
        assert [answer for _, answer, about in turns if about == "line direction"] == ["up" if rises else "down"]


def test_things_in_videos_move_as_the_answers_say() -> None:
    checked: Counter[str] = Counter()
    for seed in range(150):
        sample = skills.make(world(), seed, "video")
        if any(about == "stays" for _, _, about in sample.turns):
            continue
        (top, left), (bottom, right) = middle(sample.targets[0]), middle(sample.targets[-1])
        down, across = bottom - top, right - left
        for question, answer, about in sample.turns:
            checked[about] += 1
            if about == "direction":
                seen = (
                    ("right" if across > 0 else "left") if abs(across) > abs(down) else ("down" if down > 0 else "up")
                )
                assert answer == seen, question
            elif about == "grows":
                areas = [(targets[0] > 0).sum() for targets in sample.targets]
                assert (answer == "bigger") == (areas[0] < areas[-1])
    assert checked["direction"] > 40 and checked["grows"] > 10


def test_pictures_are_compared_as_they_are() -> None:
    checked: Counter[str] = Counter()
    for seed in range(150):
        sample = skills.make(world(), seed, "two")
        kinds = [set(targets[0].tolist()) - {0} for targets in sample.targets]
        areas = [(targets[0] > 0).sum() for targets in sample.targets]
        middles = [(targets[2] == 1).sum() for targets in sample.targets]
        for question, answer, about in sample.turns:
            checked[about] += 1
            if about in ("same shape", "same thing"):
                assert answer == wordings.yes_no(kinds[0] == kinds[1]), question
            elif about == "picture of bigger":
                assert answer == ("first" if areas[0] > areas[1] else "second"), question
            elif about == "picture of more":
                assert answer == ("first" if middles[0] > middles[1] else "second"), question
            elif about == "picture with":
                (kind,) = kinds[0] if answer == "first" else kinds[1]
                assert skills.KINDS[kind] in question
    assert min(checked[about] for about in ("same shape", "same thing", "picture of bigger", "picture of more")) > 15


def test_yes_and_no_are_both_right_about_half_the_time() -> None:
    said = Counter(
        answer
        for seed in range(400)
        for skill in ("single", "pair", "emoji")
        for _, answer, _ in skills.make(world(), seed, skill).turns
        if answer in ("yes", "no")
    )
    assert 0.35 < said["yes"] / said.total() < 0.65


@pytest.mark.parametrize("skill", ["single", "pair", "count", "emoji", "flag", "sketch", "chart", "two", "video"])
def test_training_asks_several_times_and_nothing_twice(skill: str) -> None:
    asked = {True: 0, False: 0}
    for held, seed in itertools.product(asked, range(60)):
        turns = skills.make(world(held), seed, skill, pixels=False).turns
        assert len({turn.question for turn in turns}) == len(turns), (skill, seed)
        asked[held] += len(turns)
    assert asked[False] > 1.5 * asked[True]


def test_a_patch_is_named_for_the_object_that_covers_it() -> None:
    picture = draw.background(Random(0), {"red"})
    draw.add_shape(picture, "square", "red", (64, 64), 60, Random(0))
    kinds, colours, centres, sizes, heights, second = picture.targets({"background": 0, "square": 1}).reshape(6, 8, 8)
    assert kinds[1:3, 1:3].all() and not kinds[5:].any() and not kinds[:, 5:].any()
    assert (colours[kinds == 1] == draw.COLOURS.index("red")).all()
    assert centres.sum() == 1 and centres[1:3, 1:3].sum() == 1
    assert set(sizes[kinds == 1]) == {3} and set(heights[kinds == 1]) <= {3, 4}
    assert (sizes[kinds == 0] == draw.UNKNOWN).all() and not second.any()


def test_two_small_letters_in_one_patch_are_both_named() -> None:
    picture = draw.background(Random(0), {"red"})
    for letter, x in (("A", 36), ("B", 48), ("C", 150)):
        mask = Image.new("L", (12, 20), 255)
        picture.stamp(mask, (x, 40), (255, 0, 0), letter, "red")
    index = {"background": 0, "A": 1, "B": 2, "C": 3}
    kinds, _, centres, _, _, second = picture.targets(index)
    assert [kinds[patch] for patch in np.nonzero(centres == 1)[0]] == [1, 3]
    (patch,) = np.nonzero(second)[0]
    assert kinds[patch] == 1 and second[patch] == draw.CHARACTERS.index("B") + 1


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
        "<|im_start|>User:<fake_token_around_image><global-img>" + "<image>" * 64 + "<fake_token_around_image>"
        "What is this?<end_of_utterance>\nAssistant: a dog<end_of_utterance>"
        "\nUser: What color is it?<end_of_utterance>\nAssistant: brown<end_of_utterance>"
    )


def test_turns_apart_are_what_each_would_be_alone(writer: conversations.Writer) -> None:
    """The mask and the places make a row of five questions the same as five rows of one."""
    torch.manual_seed(0)
    model = SmolVLM(shape.config(writer.tokenizer)).eval()
    model.reset_parameters()
    model.post_init()
    turns = [("What is this?", "dog"), ("Is it red?", "yes"), ("Where is it?", "top left")]
    pixels = torch.randn(1, 1, 3, 128, 128)
    batches = SimpleNamespace(extra={})
    sighted_model = sighted.Sighted(model, symbols.Symbols(192), batches, 0.5).eval()  # type: ignore[arg-type]
    row = writer.row(turns, apart=True)
    batches.extra = {"branches": row.branches[None], "pictures": torch.tensor([1])}
    with torch.no_grad():
        together = sighted_model(input_ids=row.ids[None], pixel_values=pixels, position_ids=row.places[None])[0]
        for index, turn in enumerate(turns):
            ids, labels = writer.write([turn])
            alone = model(input_ids=ids[None], pixel_values=pixels)[0]
            own = row.branches == index + 1
            assert torch.equal(row.labels[own], labels[-int(own.sum()) :])
            torch.testing.assert_close(together[own], alone[-int(own.sum()) :], atol=1e-4, rtol=1e-4)


def test_symbols_say_what_they_were_told() -> None:
    table = symbols.Symbols(192)
    targets = torch.from_numpy(np.concatenate([skills.make(world(), seed, "pair").targets for seed in range(20)]))
    features = table.describe(targets)
    for field, wanted in symbols.with_places(targets).items():
        known = wanted != draw.UNKNOWN
        read = table.logits(features, field).argmax(-1)
        assert (read == wanted)[known].float().mean() > 0.9, field
    losses = table.losses(features.requires_grad_(), targets)
    symbols.total(losses).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_a_connector_is_translated_to_what_a_tower_says() -> None:
    """Least squares finds the symbols in features that hold them in another language."""
    table = symbols.Symbols(192)
    targets = torch.from_numpy(np.concatenate([skills.make(world(), seed, "single").targets for seed in range(30)]))
    told = table.describe(targets).flatten(0, 1)
    language = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(1)))[0]
    into_symbols, explained = train.least_squares(told @ language, told)
    assert explained > 0.95
    assert (told @ language @ into_symbols - told).abs().mean() < 0.05


def test_training_resumes_in_the_middle_of_a_window(writer: conversations.Writer) -> None:
    def stream(start: int) -> Iterator[Any]:
        batches = sighted.DenseBatches(Path("unused"), batch_size=2, pad_token_id=2)
        batches.dataset._ready = world(), writer
        for batch in batches.stream(start):
            yield batch | batches.extra

    mixture = {"single": 0.5, "two": 0.25, "video": 0.25}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skills, "MIXTURE", mixture)
        whole = list(itertools.islice(stream(0), sighted.WINDOW + 2))
        again = next(stream(sighted.WINDOW + 1))
    assert all(torch.equal(again[name], whole[-1][name]) for name in again)
    for batch in whole:
        rows, length = batch["input_ids"].shape
        assert batch["branches"].shape == batch["position_ids"].shape == (rows, length)
        assert len(batch["targets"]) == batch["pictures"].sum() and batch["pixel_values"].dtype == torch.uint8
        tokens = (batch["input_ids"] == writer.ids("<image>")[0]).sum(1)
        assert torch.equal(tokens, batch["pictures"] * writer.tokens_per_tile)


def test_a_whitened_projection_sees_more_than_mean_colours() -> None:
    """Its outputs on pictures like those it was made from are uncorrelated and of one variance."""
    pixels = torch.from_numpy(np.concatenate([skills.make(world(), seed, "emoji").pixels for seed in range(60)]))
    tower = SiglipTower(VisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1,
                                     image_size=128, patch_size=16))  # fmt: skip
    tower.reset_parameters()
    warmup.whiten(tower, pixels, scale=0.5)
    with torch.no_grad():
        seen = tower.embeddings.patch_embedding(normalise(pixels)).flatten(2).transpose(0, 1).flatten(1)
    covariance = torch.cov(seen)
    assert seen.mean(1).abs().max() < 1e-3
    assert (covariance.diagonal() > 0.1).all() and (covariance.diagonal() < 0.26).all()
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.01


@pytest.mark.parametrize("text", ["Käse, 漢字 und 🐶!", "  two  spaces\n\ttab", "SELECT * FROM x;", ""])
def test_any_text_can_be_written(writer: conversations.Writer, text: str) -> None:
    assert writer.tokenizer.decode(writer.tokenizer.encode(text).ids) == text


def test_every_answer_word_of_the_recipe_is_known(writer: conversations.Writer) -> None:
    names = [json.loads((RECIPE / f"{kind}_names.json").read_text()) for kind in ("emoji", "flag", "sketch")]
    for answer in (*draw.SHAPES, *draw.COLOURS, *(word for table in names for word in table)):
        assert len(writer.tokenizer.encode(f" {answer}").ids) <= 4, answer
