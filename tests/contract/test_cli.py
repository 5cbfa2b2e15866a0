"""What other software reads from the command line: JSON objects, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SMOLVLM = [sys.executable, "-c", "from smolvlm_fms.cli import main; main()"]


def run(*arguments: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SMOLVLM, *map(str, arguments)], input=typed, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "photo.png"
    picture = Image.new("RGB", (300, 200), "white")
    picture.paste("red", (90, 40, 210, 160))
    picture.save(path)
    return path


def test_ask_prints_the_promised_object(photo: Path) -> None:
    done = run("ask", photo, "What colour is the square?", "--json", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"text", "finish_reason", "usage", "timings", "model"}
    assert set(answer["usage"]) >= {"prompt_tokens", "image_tokens", "completion_tokens"}
    timings = {"load_s", "preprocess_s", "vision_s", "prefill_s", "decode_s", "ttft_s", "total_s"}
    assert set(answer["timings"]) == timings
    assert answer["usage"]["prompt_tokens"] > answer["usage"]["image_tokens"] > 0
    assert 0 < answer["usage"]["completion_tokens"] <= 8
    assert answer["finish_reason"] in {"stop", "length", "loop"}
    assert answer["timings"]["total_s"] >= answer["timings"]["ttft_s"] > 0


def test_ask_streams_the_same_text(photo: Path) -> None:
    question = ("ask", photo, "What colour is the square?", "--max-tokens", "8")
    streamed, whole = run(*question), run(*question, "--json")
    assert streamed.stdout.rstrip("\n") == json.loads(whole.stdout)["text"].rstrip("\n")


def test_chat_keeps_the_conversation(photo: Path) -> None:
    done = run(
        "chat", photo, "--max-tokens", "6", typed="What is this?\nAnd the colour?\n/image no.png\nWell?\n/quit\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    assert "no.png" in done.stderr  # reported; the conversation went on to its end


def test_batch_answers_in_order_and_goes_on_where_it_stopped(photo: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [{"images": [str(photo)], "question": q} for q in ("What is this?", "What colour?")]
    lines.insert(1, {"images": ["missing.png"], "question": "What is this?"})
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("batch", questions, "-o", answers, "--max-tokens", "6")
    assert done.returncode == 3, done.stderr
    results = [json.loads(line) for line in answers.read_text().splitlines()]
    assert ["error" in result for result in results] == [False, True, False]
    alone = run("ask", photo, "What colour?", "--json", "--max-tokens", "6")
    assert results[2]["text"] == json.loads(alone.stdout)["text"]
    answers.write_text(answers.read_text().splitlines(keepends=True)[0] + '{"text": "cut')
    assert run("batch", questions, "-o", answers, "--max-tokens", "6").returncode == 3
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [r.get("text") for r in again] == [r.get("text") for r in results]


def test_inspect_prints_the_promised_object_and_the_grid(photo: Path, tmp_path: Path) -> None:
    done = run("inspect", photo, "--json", "--save", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["tiles"]) == {"rows", "cols", "count"}
    assert report["image_tokens"] == report["tiles"]["count"] * report["tokens_per_tile"]
    assert report["prompt"].count("<image>") == report["image_tokens"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert list(grid.size) == report["resized"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "no-such-file.jpg", "What is this?"], "no-such-file.jpg"),
        (["ask", __file__, "What is this?"], "test_cli.py"),
        (["ask", "--model", "no-such-model", "Hello?"], "no-such-model"),
        (["ask", "Hello?", "--temperature", "-1"], "temperature"),
        (["ask", "Hello?", "--threads", "0"], "threads must be at least 1"),
        (["ask", "Hello?", "--quantize-tower", "int4"], "quantize_tower"),
        (["inspect", "no-such-file.jpg"], "no-such-file.jpg"),
        (["verify", "no-such-model"], "no-such-model"),
        (["eval", "no-such-model"], "no-such-model"),
        (["eval", "--skills", "nonsense"], "nonsense"),
        (["eval", "--data", "no-such-folder"], "no-such-folder"),
    ],
)
def test_our_errors_are_one_line_and_exit_1(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert done.stdout == ""


def test_wrong_usage_exits_2() -> None:
    assert run("ask", "Hello?", "--no-such-option").returncode == 2
    assert run("no-such-command").returncode == 2


def test_help_answers_at_once() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("ask", "inspect", "verify", "demo", "train"):
        assert command in done.stdout
