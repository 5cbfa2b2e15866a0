"""Scores against hand cases; the command end to end on a model that reads from a script; what goes wrong."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

import smolvlm_fms as sv
from smolvlm_fms.cli import app
from smolvlm_fms.errors import FetchError, ImageError, InputError
from smolvlm_fms.evaluation.journal import Journal, fingerprint
from smolvlm_fms.evaluation.pictures import filled
from smolvlm_fms.evaluation.run import evaluate
from smolvlm_fms.evaluation.scoring import Mark, edits, mark, normalise, summarise
from smolvlm_fms.evaluation.suite import find_suites, read_suite
from tests.scripted import build_docling_checkpoint, scripted_vlm
from tests.videos import make_video

# --- scoring ---


@pytest.mark.parametrize(
    ("said", "wanted", "number"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ],
)
def test_edits_by_hand(said: str, wanted: str, number: int) -> None:
    assert edits(said, wanted) == number


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edits_are_the_fewest(left: str, right: str) -> None:
    @cache
    def fewest(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        same = fewest(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        return min(same, fewest(i - 1, j) + 1, fewest(i, j - 1) + 1)

    assert edits(left, right) == fewest(len(left), len(right)) == edits(right, left)


@pytest.mark.parametrize(
    ("said", "right"),
    [(" Top  left.\n", True), ("top left", True), ("TOP LEFT..", True), ("topleft", False), ("the top left", False)],
)
def test_exact_evens_out_blanks_case_and_a_final_stop(said: str, right: bool) -> None:
    assert mark("exact", said, ["elsewhere", "top left"]) == Mark(float(right), 1.0)


def test_normalise_composes_and_keeps_stops_inside() -> None:
    assert normalise("cafe\u0301 3.5.") == "café 3.5"


def test_cer_keeps_case_and_takes_the_nearest_answer() -> None:
    assert mark("cer", " Hallo  Welt ", ["Hallo Welt"]) == Mark(0, 10)
    assert mark("cer", "hallo", ["Hallo"]) == Mark(1, 5)
    assert mark("cer", "one", ["seventeen", "on"]) == Mark(1, 2)
    assert mark("cer", "far too much", ["a"]).points > 1


def test_an_unknown_metric_raises() -> None:
    with pytest.raises(ValueError, match="bleu"):
        mark("bleu", "a", ["a"])


def test_shares_have_wilsons_interval() -> None:
    score = summarise("exact", [Mark(1, 1)] * 7 + [Mark(0, 1)] * 3)
    assert (score.value, score.n) == (0.7, 10)
    assert (round(score.low, 4), round(score.high, 4)) == (0.3968, 0.8922)
    sure = summarise("exact", [Mark(1, 1)] * 14)
    assert (sure.high, sure.low) == pytest.approx((1, 14 / (14 + 1.959964**2)))


def test_error_rates_are_over_all_characters() -> None:
    marks = [Mark(1, 1), Mark(0, 9)] * 30
    score = summarise("cer", marks)
    assert score.value == pytest.approx(0.1), "not the mean of 100 % and 0 %"
    assert 0 < score.low < 0.1 < score.high < 0.25
    assert summarise("cer", marks) == score, "the same draws each time"


# --- reading tests ---


def png(grey: int, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, name: str, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for grey in (0, 80, 255):
        (folder / f"{grey}.png").write_bytes(png(grey))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def image(name: str) -> dict[str, str]:
    return {"type": "image", "path": name}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_every_form_of_a_question_is_read(tmp_path: Path) -> None:
    asked = [image("0.png"), text("How dark?")]
    rows = [
        {"test": {"metric": "cer", "max_tokens": 7, "licence": "CC0"}},
        {"messages": [{"role": "user", "content": asked}], "answer": "black"},
        {"images": ["0.png", "80.png"], "question": "Which?", "answer": ["first", "1"], "kind": "two"},
        {"image": "0.png", "question": "How dark?", "answer": "black"},
        {"video": ["0.png", "80.png"], "question": "Which way?", "answer": "up"},
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "black"}]},
        {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"},
    ]
    suite = read_suite(write(tmp_path, "grey", *rows) / "grey.jsonl")
    assert (suite.name, suite.metric, suite.max_tokens) == ("grey", "cer", 7)
    assert [item.answers for item in suite.items] == [
        ("black",), ("first", "1"), ("black",), ("up",), ("black",), ("4",)
    ]  # fmt: skip
    assert [item.kind for item in suite.items] == ["", "two", "", "", "", ""]
    assert [item.question for item in suite.items][-1] == "2 + 2?"
    assert suite.items[0].messages == suite.items[2].messages == suite.items[4].messages
    assert [part["type"] for part in suite.items[1].messages[0]["content"]] == ["image", "image", "text"]


def test_a_zip_is_the_same_as_a_folder(tmp_path: Path) -> None:
    row = {"image": "0.png", "question": "How dark?", "answer": "black"}
    folder = write(tmp_path / "folder", "grey", row)
    with zipfile.ZipFile(tmp_path / "grey.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    plain, packed = read_suite(folder / "grey.jsonl"), read_suite(tmp_path / "grey.zip")
    assert plain.digest == packed.digest
    assert [item.messages for item in plain.items] == [item.messages for item in packed.items]
    assert packed.read("0.png") == plain.read("0.png")
    with pytest.raises(FetchError, match=r"grey\.zip.*9\.png"):
        packed.read("9.png")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nonsense", "line 2: not JSON"),
        ("[1]", "line 2.*list"),
        ('{"image": "0.png", "answer": "a"}', "'messages' or 'question'"),
        ('{"question": "Why?"}', "'answer'"),
        ('{"question": "Why?", "answer": []}', "'answer'"),
        ('{"question": "Why?", "answer": 7}', "'answer'"),
        ('{"question": "Why?", "image": 7, "answer": "a"}', "names no file"),
        ('{"messages": [], "answer": "a"}', "line 2"),
        ('{"messages": [{"role": "system", "content": "a"}], "answer": "a"}', "last message"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "Fine?", "answer": "yes"}\n' + line + "\n")
    with pytest.raises(InputError, match=said):
        read_suite(path)


@pytest.mark.parametrize("settings", [{"metric": "bleu"}, {"max_tokens": 0}, {"max_tokens": "9"}, []])
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: Any) -> None:
    write(tmp_path, "bad", {"test": settings}, {"question": "Fine?", "answer": "yes"})
    with pytest.raises(InputError, match="line 1"):
        read_suite(tmp_path / "bad.jsonl")


def test_folders_without_tests_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no test"):
        find_suites(tmp_path)
    with pytest.raises(FetchError, match="no folder"):
        find_suites(tmp_path / "missing")
    write(tmp_path, "grey", {"question": "Fine?", "answer": "yes"})
    with pytest.raises(InputError, match=r"'white'.*grey"):
        find_suites(tmp_path, ["white"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no questions"):
        find_suites(tmp_path)


# --- grey pictures ---


def test_a_blank_picture_is_grey_and_of_the_same_size(tmp_path: Path) -> None:
    folder = write(tmp_path, "grey", {"images": ["0.png", "wide.png"], "question": "How dark?", "answer": "black"})
    (folder / "wide.png").write_bytes(png(9, (70, 20)))
    suite = read_suite(folder / "grey.jsonl")
    (shown,), (blank,) = (filled(suite, suite.items[0], None, blank=grey) for grey in (False, True))
    sizes = [[part["image"].size for part in message["content"][:2]] for message in (shown, blank)]
    assert sizes == [[(40, 30), (70, 20)]] * 2
    assert shown["content"][0]["image"].getpixel((0, 0)) == (0, 0, 0)
    assert [part["image"].getcolors() for part in blank["content"][:2]] == [
        [(1200, (128, 128, 128))], [(1400, (128, 128, 128))]
    ]  # fmt: skip
    assert shown["content"][2] == blank["content"][2] == text("How dark?")


def test_clips_are_frames_and_their_blanks_have_as_many(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 8), (level,) * 3) for level in (0, 90, 255)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    rows = [{"video": name, "question": "Which way?", "answer": "up"} for name in ("clip.webp", ["0.png", "255.png"])]
    suite = read_suite(write(tmp_path, "clips", *rows) / "clips.jsonl")
    for item, greys in zip(suite.items, ([0, 90, 255], [0, 255]), strict=True):
        shown, blank = (filled(suite, item, None, blank=grey)[0]["content"][0]["video"] for grey in (False, True))
        assert [frame.getpixel((3, 3)) for frame in shown] == [(grey,) * 3 for grey in greys]
        assert [frame.getpixel((3, 3)) for frame in blank] == [(128,) * 3] * len(greys)
        assert [frame.size for frame in blank] == [frame.size for frame in shown]


def test_clips_say_how_many_of_their_frames_make_a_second(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 8), (level,) * 3) for level in (0, 90, 255)]
    frames[0].save(tmp_path / "slow.gif", save_all=True, append_images=frames[1:], duration=[500, 1000, 1500])
    ask = {"question": "Which way?", "answer": "up"}
    rows = [{"video": "slow.gif"}, {"video": ["0.png", "80.png"]}, {"video": ["0.png", "80.png"], "fps": 3}]
    suite = read_suite(write(tmp_path, "clips", *[{**row, **ask} for row in rows]) / "clips.jsonl")
    for item, rate in zip(suite.items, (1.0, 24.0, 3), strict=True):
        assert [filled(suite, item, None, blank=grey)[0]["content"][0]["fps"] for grey in (False, True)] == [rate] * 2
    write(tmp_path, "bad", {"video": ["0.png", "80.png"], "fps": "many", **ask})
    with pytest.raises(InputError, match="'many' came"):
        read_suite(tmp_path / "bad.jsonl")


def test_a_film_goes_to_the_checkpoint_as_a_file_and_its_blank_as_its_frames(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(make_video(40))
    suite = read_suite(write(tmp_path, "films", {"video": "film.mp4", "question": "?", "answer": "a"}) / "films.jsonl")
    processor = sv.load("demo").processor
    shown, blank = (filled(suite, suite.items[0], processor, blank=grey)[0]["content"][0]["video"] for grey in (0, 1))
    assert shown == (tmp_path / "film.mp4").read_bytes()
    assert {frame.getpixel((0, 0)) for frame in blank} == {(128, 128, 128)}
    taken = processor.video_processor([shown], do_sample_frames=True, return_tensors="pt")["pixel_values"].shape[1]
    assert len(blank) == taken


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path, "grey", {"image": "broken.png", "question": "How dark?", "answer": "black"})
    (tmp_path / "broken.png").write_bytes(png(0)[:40])
    suite = read_suite(tmp_path / "grey.jsonl")
    with pytest.raises(ImageError, match=r"grey: grey\.jsonl, line 1"):
        filled(suite, suite.items[0], None)


# --- end to end ---

SAYS: dict[int, str | Exception] = {0: "black.", 80: "dark", 128: "black", 255: "white as snow"}
ROWS = [
    {"image": "0.png", "question": "How dark?", "answer": "Black", "kind": "dark"},
    {"image": "80.png", "question": "How dark?", "answer": ["grey", "dark"], "kind": "dark"},
    {"image": "255.png", "question": "How dark?", "answer": "white", "kind": "light"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_docling_checkpoint(tmp_path_factory.mktemp("scripted"))


@pytest.fixture
def vlm(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sv.VLM]:
    """A scripted model, which is also what ``smolvlm eval`` loads."""
    scripted = scripted_vlm(checkpoint, SAYS)
    monkeypatch.setattr(sv, "load", lambda *_, **__: scripted)
    yield scripted


def smolvlm(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_promised_object(vlm: sv.VLM, checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path, "shades", *ROWS)
    write(tmp_path, "letters", {"test": {"metric": "cer"}}, {"image": "255.png", "question": "?", "answer": "white"})
    done = smolvlm(checkpoint, "--data", tmp_path, "--skills", "shades, letters", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["model"] == str(checkpoint)
    assert result["skills"] == {
        "shades": {"metric": "exact", "score": 0.6667, "blank": 0.3333, "n": 3},
        "letters": {"metric": "cer", "score": 1.6, "blank": 1.0, "n": 1},
    }
    assert list(result["skills"]) == ["shades", "letters"], "in the order asked for"
    assert result["details"]["shades"]["kinds"] == {
        "dark": {"score": 1.0, "blank": 0.5, "n": 2},
        "light": {"score": 0.0, "blank": 0.0, "n": 1},
    }
    low, high = result["details"]["shades"]["interval"]
    assert 0 < low < 0.6667 < high < 1
    again = smolvlm(checkpoint, "--data", tmp_path, "--skills", "shades,letters", "--json")
    assert again.stdout == done.stdout


def test_the_table(vlm: sv.VLM, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = smolvlm(checkpoint, "--data", write(tmp_path, "shades", *ROWS))
    assert done.exit_code == 0, done.output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert cells == [
        ["shades", "exact", "66.7%", "20.8% – 93.9%", "33.3%", "3"],
        ["dark", "", "100.0%", "", "50.0%", "2"],
        ["light", "", "0.0%", "", "0.0%", "1"],
    ]


def test_limit_and_no_blank(vlm: sv.VLM, checkpoint: Path, tmp_path: Path) -> None:
    done = smolvlm(checkpoint, "--data", write(tmp_path, "shades", *ROWS), "--limit", 2, "--no-blank", "--json")
    assert json.loads(done.stdout)["skills"] == {"shades": {"metric": "exact", "score": 1.0, "blank": None, "n": 2}}
    assert sorted(vlm.engine.backend.greys) == [0, 80]  # type: ignore[attr-defined]


def test_a_stopped_run_goes_on(vlm: sv.VLM, checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "data", "shades", *ROWS)
    command = (checkpoint, "--data", tmp_path / "data", "--json", "--save", tmp_path / "answers.jsonl")
    whole = smolvlm(*command)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * len(ROWS)
    row = json.loads(lines[2])
    assert (row["said"], row["answers"], row["points"], row["question"]) == ("dark", ["grey", "dark"], 1, "How dark?")
    greys = vlm.engine.backend.greys  # type: ignore[attr-defined]
    greys.clear()
    assert smolvlm(*command).stdout == whole.stdout and greys == [], "nothing was asked again"
    (tmp_path / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert smolvlm(*command).stdout == whole.stdout
    assert (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True) == lines


def test_ctrl_c_keeps_the_answers(vlm: sv.VLM, checkpoint: Path, tmp_path: Path) -> None:
    suite = read_suite(write(tmp_path, "shades", *ROWS) / "shades.jsonl")
    seen: list[int] = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    file, header = tmp_path / "answers.jsonl", {"model": "scripted"}
    with pytest.raises(KeyboardInterrupt), Journal(file, header) as journal:
        list(evaluate(vlm, [suite], journal=journal, advance=stop))
    with Journal(file, header) as kept:
        assert kept.count == 2


def test_answers_of_another_checkpoint_are_refused(vlm: sv.VLM, checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "data", "shades", *ROWS)
    answers = tmp_path / "answers.jsonl"
    assert smolvlm(checkpoint, "--data", tmp_path / "data", "--save", answers).exit_code == 0
    with pytest.raises(InputError, match="another checkpoint"):
        Journal(answers, {"model": "other"})
    answers.write_text("not a line of ours\n")
    with pytest.raises(InputError, match="no saved answers"):
        Journal(answers, {"model": "other"})
    with pytest.raises(FetchError, match="answers"):
        Journal(tmp_path / "missing" / "answers.jsonl", {})


def test_the_fingerprint_follows_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert fingerprint(tmp_path) == fingerprint(checkpoint)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(weights))
    assert fingerprint(tmp_path) != fingerprint(checkpoint)


def test_what_a_checkpoint_cannot_do_is_said_and_the_rest_is_scored(
    vlm: sv.VLM, checkpoint: Path, tmp_path: Path
) -> None:
    write(tmp_path, "clips", {"video": ["0.png", "80.png"], "question": "Which way?", "answer": "up"})
    write(tmp_path, "shades", *ROWS)
    done = smolvlm(checkpoint, "--data", tmp_path, "--json")
    assert done.exit_code == 3
    assert "clips could not be run" in done.stderr
    result = json.loads(done.stdout)
    assert result["skills"]["clips"] == {"metric": "exact", "score": None, "blank": None, "n": 0}
    assert "video" in result["details"]["clips"]["error"]
    assert result["skills"]["shades"]["n"] == 3
    assert smolvlm(checkpoint, "--data", tmp_path).stdout.count("–") >= 2


def test_a_test_that_cannot_be_read_stops_the_run(vlm: sv.VLM, checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path, "shades", *ROWS, {"image": "no.png", "question": "?", "answer": "a"})
    done = smolvlm(checkpoint, "--data", tmp_path)
    assert isinstance(done.exception, FetchError) and "line 4" in str(done.exception)
    assert smolvlm(checkpoint, "--skills", "nonsense").exit_code == 1
