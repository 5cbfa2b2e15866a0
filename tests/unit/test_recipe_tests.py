"""The packaged tests come from the held-out side and can be built again; the model card says what was measured."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smolvlm_fms.bundle import bundled
from smolvlm_fms.evaluation.pictures import filled
from smolvlm_fms.evaluation.scoring import Mark
from smolvlm_fms.evaluation.suite import BUNDLED, Suite, find_suites

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "bundled"
sys.path.insert(0, str(RECIPE))

import art  # noqa: E402
import baselines  # noqa: E402
import draw  # noqa: E402
import make_tests  # noqa: E402
import model_card  # noqa: E402
import plots  # noqa: E402
import skills  # noqa: E402
import sources  # noqa: E402
import wordings  # noqa: E402
from world import COMBOS_HELD_OUT, World  # noqa: E402


@pytest.fixture(scope="module")
def suites() -> dict[str, Suite]:
    return {suite.name: suite for suite in find_suites()}


def rows(name: str) -> list[dict[str, Any]]:
    with zipfile.ZipFile(bundled("eval") / f"{name}.zip") as archive:
        return [json.loads(line) for line in archive.read(f"{name}.jsonl").decode().splitlines()]


# --- the split ---


def test_the_two_sides_share_nothing() -> None:
    assert not set(sources.TRAIN_ICONS) & set(sources.HELD_OUT_ICONS)
    assert not set(sources.TRAIN_FONTS) & set(sources.HELD_OUT_FONTS)
    assert not any(icon.startswith("flag") for icons in art.EMOJI.values() for icon in icons), (
        "Twemoji's flags are held out"
    )
    trained_flags = {*sources.FLAG_PACKAGES, "emojione"}
    assert not any("twemoji" in name for name in trained_flags)
    seen, unseen = (World(held, [], [], {}) for held in (False, True))
    pairs = [{world.combo(Random(seed)) for seed in range(2000)} for world in (seen, unseen)]
    assert pairs[1] == COMBOS_HELD_OUT and not pairs[0] & pairs[1]


def test_drawings_are_on_one_side_only(tmp_path: Path) -> None:
    (tmp_path / "art").mkdir()
    drawings = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((28, 28), np.uint8)
    np.savez(tmp_path / "art" / "sketches.npz", apple=drawings)
    seen, unseen = (set(art.load_sketches(tmp_path, held)["apple"][:, 0, 0].tolist()) for held in (False, True))
    assert unseen == set(range(art.SKETCHES_HELD_OUT)) and not seen & unseen and len(seen | unseen) == 100


def test_every_question_was_made_of_held_out_material() -> None:
    assert (
        {row["source"]["set"] for row in rows("emoji_unseen_art")[1:]}
        == {"fluent-emoji"}
        <= set(sources.HELD_OUT_ICONS)
    )
    assert {row["source"]["set"] for row in rows("flags_unseen_set")[1:]} == {"twemoji"}
    assert {row["source"]["drawing"] for row in rows("sketches")[1:]} <= set(range(art.SKETCHES_HELD_OUT))
    fonts = {row["source"]["font"].split("/")[0] for row in rows("reading_unseen_fonts")[1:]}
    assert fonts == set(sources.HELD_OUT_FONTS)
    assert {row["source"]["style"] for row in rows("charts")[1:]} == set(plots.STYLES)


def test_random_letters_never_spell_a_held_out_word() -> None:
    world = World(False, ["font"], ["tern"], {}, banned=frozenset("abcdefghijklm"))
    said: Counter[str] = Counter()
    for seed in range(3000):
        said.update(letters for letters in drawn_words(world, seed) if letters != "TERN")
    assert not said.keys() & set("ABCDEFGHIJKLM") and said.keys() >= set("NOPQRSTUVWXYZ")


def drawn_words(world: World, seed: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skills, "written", lambda world, rng, text, about: text.split())
        return list(skills.word(world, Random(seed)))


def test_reading_takes_held_out_words_of_four_letters_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def written(world: World, rng: Random, text: str, about: str) -> Any:
        asked.append(text)
        assert world.fonts == ["inter/Inter.otf"]
        return draw.background(rng, set()), [wordings.Turn("What does it say?", text, about)]

    monkeypatch.setattr(skills, "written", written)
    words = ["abc", "moss", "tern", "wren", "lark", "dove", "rook", "abcd"]
    questions = list(make_tests.reading(World(True, ["inter/Inter.otf"], words, {}), Path()))
    assert [one.turn.answer for one in questions] == asked
    assert {word for text in asked for word in text.split() if not word.isdigit()} == {w.upper() for w in words[1:]}
    lengths = Counter((one.kind, len(one.turn.answer.split())) for one in questions)
    assert {kind for kind, _ in lengths} == set(make_tests.READING)
    assert {n for kind, n in lengths if kind == "three to six"} == {3, 4, 5, 6}
    assert questions[0].source == {"font": "inter/Inter"}


# --- the files ---


def test_every_packaged_test_can_be_asked(suites: dict[str, Suite]) -> None:
    assert tuple(suites) == BUNDLED
    assert sum(path.stat().st_size for path in bundled("eval").iterdir()) < 4.5e6
    for suite in suites.values():
        assert 200 <= len(suite.items) <= 300
        for item in suite.items[:6]:
            (message,) = filled(suite, item, None)
            media = [part for part in message["content"] if part["type"] != "text"]
            shown = [picture for part in media for picture in (part.get("video") or [part["image"]])]
            assert len(shown) == {"two_pictures": 2, "video": 3}.get(suite.name, 1)
            assert {picture.size for picture in shown} == {(160, 160) if len(shown) > 1 else (256, 256)}
        settings = rows(suite.name)[0]["test"]
        assert settings["licence"] and settings["about"]


def test_answers_are_words_that_the_model_was_taught(suites: dict[str, Suite]) -> None:
    for name, known in (
        ("emoji_unseen_art", art.EMOJI),
        ("flags_unseen_set", art.COUNTRIES),
        ("sketches", art.SKETCHES),
    ):
        said = Counter(item.answers[0] for item in suites[name].items)
        assert set(said) == set(known) and len(set(said.values())) == 1, "every class as often as every other"
    assert all(item.answers[0] == item.answers[0].upper() for item in suites["reading_unseen_fonts"].items)
    kinds = Counter(item.kind for item in suites["shapes"].items)
    assert set(kinds) == set(make_tests.SHAPES) and set(kinds.values()) == {32}


def test_the_shapes_are_built_again_from_nothing(tmp_path: Path, suites: dict[str, Suite]) -> None:
    """They need no fonts, art or drawings; the other tests go the same way with them."""
    path = make_tests.build("shapes", World(True, [], [], {}), tmp_path, tmp_path)
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(bundled("eval") / "shapes.zip") as old:
        assert new.read("shapes.jsonl") == old.read("shapes.jsonl")
        assert new.namelist() == old.namelist()
        for name in new.namelist()[:40]:
            pair = [np.asarray(Image.open(io.BytesIO(archive.read(name)))).astype(int) for archive in (new, old)]
            assert np.abs(pair[0] - pair[1]).mean() < 2, "another libwebp rounds otherwise, it does not draw otherwise"
    again = make_tests.build("shapes", World(True, [], [], {}), tmp_path, tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_charts_ask_what_the_recipe_teaches() -> None:
    assert set(plots._ABOUT) == set(plots.KINDS)
    assert set().union(*plots._ABOUT.values()) <= set(wordings.WORDINGS)


# --- the card ---

RESULTS = {
    "model": "demo",
    "skills": {
        "shapes": {"metric": "exact", "score": 0.8, "blank": 0.3, "n": 256},
        "reading_unseen_fonts": {"metric": "cer", "score": 0.03, "blank": 1.1, "n": 240},
        "video": {"metric": "exact", "score": None, "blank": None, "n": 0},
    },
    "details": {
        "shapes": {"interval": [0.75, 0.85], "kinds": {"count": {"score": 0.5, "blank": 0.2, "n": 32}}},
        "reading_unseen_fonts": {"interval": [0.02, 0.04]},
        "video": {"error": "no videos"},
    },
}


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    (tmp_path / "RESULTS.json").write_text(json.dumps(RESULTS))
    baseline = {"reading_unseen_fonts": {"tesseract": {"metric": "cer", "score": 0.25}}}
    (tmp_path / "BASELINES.json").write_text(json.dumps(baseline))
    run = {"parameters": 5_000_000, "pictures": 123_456, "hours": 1.5, "machine": "two cores", "parts": ["warm-up"]}
    (tmp_path / "RUN.json").write_text(json.dumps(run))
    model_card.write(tmp_path)
    card, readme = ((tmp_path / name).read_text() for name in ("MODEL_CARD.md", "README.md"))
    line = "| shapes | exact | **80.0%** | 75.0% – 85.0% | 30.0% | ≥ 97% | – | 256 |"
    assert line in card and line in readme and "old" not in readme and readme.endswith("after\n")
    assert "| reading_unseen_fonts | cer | **3.0%** | 2.0% – 4.0% | 110.0% | ≤ 4% | 25.0% (tesseract) | 240 |" in card
    assert "| video | exact | **–** |" in card
    assert "**shapes**: 17.0 points short of the goal" in card and "**reading_unseen_fonts**: goal met" in card
    assert "**charts**: not measured." in card and "| shapes | count | 50.0% | 20.0% | 32 |" in card
    assert "5.0 M parameters" in card and "123,456 pictures in 1.5 hours on two cores" in card and "- warm-up" in card
    assert "curve.svg" not in card and "an estimate" not in card


def test_a_longer_run_is_extrapolated_from_the_last_two_points() -> None:
    curve = [
        {"pictures": 10, "skills": {"shapes": 0.0}},
        {"pictures": 100, "skills": {"shapes": 0.6, "reading_unseen_fonts": 0.1}},
        {"pictures": 200, "skills": {"shapes": 0.8, "reading_unseen_fonts": 0.2}},
    ]
    expected = model_card.longer_run(RESULTS, curve)
    assert expected["shapes"] == pytest.approx(1 - 0.2 / 10), "halved by twice the pictures: a tenth of it by ten times"
    assert expected["reading_unseen_fonts"] == pytest.approx(0.2), "what got worse is not expected to get better"
    assert model_card.longer_run(RESULTS, curve[:1]) == {}


def test_evaluating_writes_results_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suites: dict[str, Suite]
) -> None:
    import evaluate

    monkeypatch.setattr("smolvlm_fms.evaluation.suite.find_suites", lambda: [suites["shapes"].first(2)])
    monkeypatch.setattr(evaluate, "FOLDER", tmp_path)
    monkeypatch.setattr(evaluate, "DEMO", bundled("demo"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(bundled("demo"))])
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    evaluate.main()
    results = json.loads((tmp_path / "RESULTS.json").read_text())
    assert results["model"] == "demo" and results["skills"]["shapes"]["n"] == 2
    assert "| shapes | exact |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "MODEL_CARD.md").exists()


def test_the_committed_card_belongs_to_the_committed_results() -> None:
    results, measured, run = (model_card.read(RECIPE / f"{name}.json") for name in ("RESULTS", "BASELINES", "RUN"))
    card = model_card.card(results, measured, run, (RECIPE / "curve.svg").exists())
    assert (RECIPE / "MODEL_CARD.md").read_text(encoding="utf-8") == card


def test_a_baselines_row(suites: dict[str, Suite]) -> None:
    suite = suites["reading_unseen_fonts"].first(4)
    row = baselines.row(suite, [Mark(1, 2), Mark(0, 5), Mark(1, 8), Mark(0, 5)])
    assert (row["metric"], row["score"], row["n"]) == ("cer", 0.1, 4)
    assert set(row["kinds"]) == {item.kind for item in suite.items}


def test_the_gallery_is_training_art_by_name() -> None:
    emoji = np.full((160, 160, 4), 255, np.uint8)
    world = World(
        False, [], [], {"dog": [emoji], "cat": [emoji, emoji]}, {}, {"key": np.full((3, 28, 28), 255, np.uint8)}
    )
    assert [name for name, _ in baselines.gallery(world, "emoji_unseen_art", 2)] == ["dog"] * 2 + ["cat"] * 4
    shown = dict(baselines.gallery(world, "sketches", 2))
    assert shown["key"].size == (256, 256)
