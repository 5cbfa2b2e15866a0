"""``sv.load`` and its object, on tiny random checkpoints: answers, streams, batches, caches, limits, bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import smolvlm_fms as sv
from smolvlm_fms.engine import kernels, prepare
from smolvlm_fms.engine.cpu_runner import CpuRunner
from smolvlm_fms.engine.detokenizer import Detokenizer
from smolvlm_fms.engine.machine import available_memory, cpu_count
from smolvlm_fms.engine.prepare import content_digest
from smolvlm_fms.engine.runner import ModelRunner
from smolvlm_fms.processing.tiling import ByteTiles
from tests.tiny import build_tokenizer
from tests.tiny_models import build_checkpoint
from tests.videos import make_video

OPEN_END = {"ignore_eos": True, "max_tokens": 12}


def photo(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("tiny"), "smolvlm", seed=3, processor=True)


@pytest.fixture(scope="module")
def vlm(folder: Path) -> sv.VLM:
    return sv.load(folder, dtype=torch.float32)


def test_an_answer_has_what_other_software_reads(vlm: sv.VLM, folder: Path) -> None:
    answer = vlm.ask(photo(0), "What is this?", **OPEN_END)
    fields = json.loads(json.dumps(dataclasses.asdict(answer)))
    assert fields["model"] == str(folder)
    assert fields["finish_reason"] == "length"
    assert fields["usage"]["image_tokens"] == 13 * 4  # 90×60 is cut into 4 × 3 tiles and an overview
    assert fields["usage"]["completion_tokens"] == 12 == len(fields["tokens"])
    assert fields["usage"]["prompt_tokens"] > 52
    assert set(fields["timings"]) == {
        "load_s", "preprocess_s", "vision_s", "prefill_s", "decode_s", "ttft_s", "total_s"
    }  # fmt: skip
    assert all(seconds >= 0 for seconds in fields["timings"].values())
    assert fields["timings"]["total_s"] >= fields["timings"]["ttft_s"] >= fields["timings"]["preprocess_s"]


def test_the_model_answers_logits(vlm: sv.VLM) -> None:
    batch = vlm.processor(text="<image>Hi", images=[photo(0)], return_tensors="pt")
    with torch.no_grad():
        logits = vlm.model(**batch)
    assert logits.shape == (*batch["input_ids"].shape, 464)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.3, "seed": 5}, {"stop": "m"}, {"temperature": 2.0, "seed": 1}]
)
def test_a_stream_is_the_answer_in_pieces(vlm: sv.VLM, options: dict[str, Any]) -> None:
    whole = vlm.ask([photo(1), photo(2)], "Compare them.", **{**OPEN_END, "max_tokens": 40}, **options)
    stream = vlm.stream([photo(1), photo(2)], "Compare them.", **{**OPEN_END, "max_tokens": 40}, **options)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.answer.text
    assert stream.answer.tokens == whole.tokens
    assert all(pieces)
    assert "m" not in whole.text or "stop" not in options


def test_text_is_the_decoded_tokens(vlm: sv.VLM) -> None:
    for seed in range(6):
        answer = vlm.ask(None, "Hello", temperature=1.5, seed=seed, max_tokens=30, ignore_eos=True)
        assert answer.text == vlm.processor.tokenizer.decode(list(answer.tokens), skip_special_tokens=True)


def test_batches_answer_as_single_questions_do(vlm: sv.VLM) -> None:
    requests: list[Any] = [
        (photo(3), "What is this?"),
        (None, "Hello"),
        {"images": [photo(4), photo(5)], "question": "Compare.", "system": "Be brief."},
        [{"role": "user", "content": [{"type": "text", "text": "Only words"}]}],
        {"question": "Without a picture", "max_tokens": 3},
        (photo(3), "And now?"),
    ]
    together = vlm.batch(requests, **OPEN_END)
    fresh = [vlm.batch([request], **OPEN_END)[0] for request in requests]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in fresh]
    assert [len(answer.tokens) for answer in together] == [12, 12, 12, 12, 3, 12]


def test_threads_share_a_model(vlm: sv.VLM) -> None:
    expected = [vlm.ask(photo(seed), "What?", **OPEN_END).tokens for seed in range(4)]
    results: dict[int, Any] = {}

    def ask(seed: int) -> None:
        results[seed] = vlm.ask(photo(seed), "What?", **OPEN_END).tokens

    workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [results[seed] for seed in range(4)] == expected


def test_a_picture_is_encoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = sv.load(folder)
    calls: list[int] = []
    encode = ModelRunner.encode
    monkeypatch.setattr(
        ModelRunner, "encode", lambda self, p, first, count: (calls.append(1), encode(self, p, first, count))
    )
    path = tmp_path / "photo.png"
    photo(7).save(path)
    first = vlm.ask(path, "What is this?", **OPEN_END)
    assert len(calls) == 13
    assert vlm.ask(str(path), "What is this?", **OPEN_END).tokens == first.tokens
    assert vlm.ask(path.read_bytes(), "And what is that?", **OPEN_END).usage.cached_tokens > 52
    vlm.engine.space.clear_prefixes()
    assert vlm.ask(path, "What is this?", **OPEN_END).tokens == first.tokens
    assert len(calls) == 13
    photo(8).save(path)
    assert vlm.ask(path, "What is this?", **OPEN_END).tokens != first.tokens, "the file's content counts, not its name"
    assert len(calls) == 26
    vlm.ask(path, "What is this?", detail="low", **OPEN_END)
    assert len(calls) == 27
    vlm.engine.images.clear()
    vlm.engine.space.clear_prefixes()
    vlm.ask(path, "What is this?", detail="low", **OPEN_END)
    assert len(calls) == 28, "pixels are made again where the features are gone"


def test_files_wait_as_bytes_and_are_the_processors_floats(vlm: sv.VLM, tmp_path: Path) -> None:
    path, film = tmp_path / "photo.png", tmp_path / "film.mp4"
    photo(9).save(path)
    film.write_bytes(make_video(frames=40, left_half=200))

    def prepared(part: dict[str, Any]) -> tuple[Any, Any]:
        return vlm.preparer.chat([{"role": "user", "content": [part]}]).pictures[0].resolve()

    processor = vlm.processor
    clip = processor.video_processor(str(film), do_sample_frames=True, return_tensors="pt")
    for part, expected in (
        ({"type": "image", "image": str(path)}, processor.image_processor(path, return_tensors="pt")),
        ({"type": "image", "image": photo(9)}, processor.image_processor(photo(9), return_tensors="pt")),
        ({"type": "video", "video": str(film)}, clip),
    ):
        tiles, mask = prepared(part)
        assert isinstance(tiles, ByteTiles) and mask is None and len(tiles) > 1
        assert torch.equal(tiles[:], expected["pixel_values"][0])
    given, _ = prepared({"type": "image", "image": np.asarray(photo(9), dtype=np.float32) / 255})
    assert isinstance(given, torch.Tensor) and given.dtype == torch.float32


def test_waiting_pictures_hold_bounded_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures beyond the bound are cut again when their turn comes, with the same answers."""
    pictures = [photo(seed) for seed in range(20, 28)]
    plain = sv.load(folder, dtype=torch.float32)
    expected = [answer.tokens for answer in plain.batch([(picture, "What?") for picture in pictures], **OPEN_END)]
    assert plain.preparer._waiting.used == 0
    tile = 3 * 32 * 32  # bytes: they become floats when it is their turn
    monkeypatch.setattr(prepare, "WAITING_BYTES", 3 * 13 * tile)
    vlm = sv.load(folder, dtype=torch.float32)
    streams = [vlm.stream(picture, "What?", **OPEN_END) for picture in pictures]
    assert vlm.preparer._waiting.used == 3 * 13 * tile
    streams.pop().cancel()
    assert [stream.finish().tokens for stream in streams] == expected[:-1]
    assert vlm.preparer._waiting.used == 0
    again = vlm.stream(photo(30), "What?", **OPEN_END)
    assert vlm.preparer._waiting.used == 13 * tile
    again.cancel()
    assert vlm.preparer._waiting.used == 0, "a cancelled picture's pixels are gone"


def test_tiles_may_go_through_the_tower_together(vlm: sv.VLM, folder: Path) -> None:
    """What GPUs are given: several tiles a step; the answers stay the same."""
    batched = sv.load(folder, dtype=torch.float32, engine=sv.EngineConfig(tiles_per_step=5))
    requests = [(photo(40), "What?"), ([photo(41), photo(42, 40, 30)], "Compare.")]
    assert [a.tokens for a in batched.batch(requests, **OPEN_END)] == [
        a.tokens for a in vlm.batch(requests, **OPEN_END)
    ]


def test_streams_never_cut_a_character(vlm: sv.VLM) -> None:
    """Characters of several tokens, by the real byte-level tokenizer of the bundled model."""
    tokenizer = sv.load("demo").processor.tokenizer
    text = "naïve 😀👩‍🚀 漢字 — Ünïcödé 🧑🏽"
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(lambda some: str(tokenizer.decode(list(some))))
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert len(ids) > len(text) and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_detail_chooses_the_tiles(vlm: sv.VLM) -> None:
    tokens = {
        detail: vlm.ask(photo(9, 40, 30), "What?", detail=detail, **OPEN_END).usage.image_tokens
        for detail in ("low", "auto", "high", None)
    }
    assert tokens == {"low": 4, "auto": 5 * 4, "high": 13 * 4, None: 13 * 4}
    with pytest.raises(sv.SmolVLMError, match="detail"):
        vlm.ask(photo(9), "What?", detail="middle")


def test_conversations_go_on_from_their_keys_and_values(vlm: sv.VLM) -> None:
    vlm.engine.space.clear_prefixes()
    turn = [{"role": "user", "content": [{"type": "image", "image": photo(10)}, {"type": "text", "text": "What?"}]}]
    first = vlm.chat(turn, max_tokens=5)
    assert first.usage.cached_tokens == 0
    follow = [
        *turn,
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    ]
    second = vlm.chat(follow, **OPEN_END)
    assert second.usage.cached_tokens >= 52
    vlm.engine.space.clear_prefixes()
    assert vlm.chat(follow, **OPEN_END).tokens == second.tokens


def test_videos_are_pictures_in_time(vlm: sv.VLM) -> None:
    frames = [photo(seed, 32, 32) for seed in range(3)]
    message = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What?"}]}]
    answer = vlm.chat(message, **OPEN_END)
    assert answer.usage.image_tokens == 3 * 4
    batch = vlm.processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert answer.usage.prompt_tokens == batch["input_ids"].shape[1]
    with torch.no_grad():
        assert answer.tokens[0] == int(vlm.model(**batch)[0, -1].argmax())


def test_frames_may_say_their_rate(vlm: sv.VLM) -> None:
    def ask(**rate: float) -> sv.Answer:
        frames = [photo(seed, 32, 32) for seed in range(3)]
        part = {"type": "video", "video": frames, **rate}
        return vlm.chat([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}], **OPEN_END)

    slow, plain = ask(fps=0.01), ask()
    assert slow.tokens != plain.tokens, "another time in the prompt is another prompt, and no cache mixes them up"
    assert ask(fps=24).tokens == plain.tokens and ask(fps=24).usage.prompt_tokens == plain.usage.prompt_tokens
    assert ask(fps=0.01).tokens == slow.tokens
    with pytest.raises(sv.PromptError, match="make a second"):
        ask(fps=-1)


def test_leaving_a_stream_early_frees_its_room(vlm: sv.VLM) -> None:
    for _ in vlm.stream(photo(11), "What?", **{**OPEN_END, "max_tokens": 300}):
        break
    assert not vlm.engine.busy
    stream = vlm.stream(None, "What?", **{**OPEN_END, "max_tokens": 300})
    iterator = iter(stream)
    next(iterator)
    stream.cancel()
    assert stream.finish().finish_reason == "cancelled"
    assert not vlm.engine.busy


def test_logprobs_come_with_the_tokens(vlm: sv.VLM) -> None:
    answer = vlm.ask(None, "Hello", logprobs=2, **OPEN_END)
    assert answer.logprobs is not None and len(answer.logprobs) == 12
    assert [one.token for one in answer.logprobs] == list(answer.tokens)
    assert all(one.top[0] == (one.token, pytest.approx(one.logprob)) and len(one.top) == 2 for one in answer.logprobs)
    assert vlm.ask(None, "Hello", **OPEN_END).logprobs is None


def test_plain_text_is_continued(vlm: sv.VLM) -> None:
    ids = vlm.processor.tokenizer.encode("The capital")
    with torch.no_grad():
        expected = int(vlm.model(torch.tensor([ids]))[0, -1].argmax())
    assert vlm.complete("The capital", **OPEN_END).tokens[0] == expected


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ({"images": "/nowhere/at/all.png", "question": "x"}, sv.FetchError),
        ({"images": b"not a picture", "question": "x"}, sv.ImageError),
        ({"images": None, "question": 3}, sv.InputError),
        ({"images": None, "question": "x " * 3000}, sv.CapacityError),
        ({"images": None, "question": "x", "max_token": 3}, sv.InputError),
        ({"images": None, "question": "x", "temperature": -1.0}, sv.InputError),
        ({"images": [object()], "question": "x"}, sv.ImageError),
    ],
)
def test_bad_questions_raise_typed_errors_and_harm_nobody(vlm: sv.VLM, question: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        vlm.ask(**question)
    assert vlm.ask(None, "Hello", **OPEN_END).finish_reason == "length"
    assert not vlm.engine.busy


def test_requests_that_are_none_are_refused(vlm: sv.VLM) -> None:
    with pytest.raises(sv.InputError, match="str came"):
        vlm.batch(["just a question"])
    with pytest.raises(sv.PromptError, match="Several conversations"):
        vlm.chat([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]])


def test_the_checkpoint_says_where_answers_end(folder: Path, tmp_path: Path) -> None:
    copied = build_checkpoint(tmp_path / "ends", "smolvlm", seed=3, processor=True)
    plain = sv.load(copied)
    ends = plain.defaults.stop_tokens
    assert plain.processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>") in ends
    tokens = plain.ask(None, "Hello", **OPEN_END).tokens
    said = {"eos_token_id": [int(tokens[3]), 7], "repetition_penalty": 1.0, "bad_words_ids": [[int(tokens[0])]]}
    (copied / "generation_config.json").write_text(json.dumps({**said, "bad_words_ids": None}))
    answer = sv.load(copied).ask(None, "Hello", max_tokens=12)
    stop = tokens.index(tokens[3])
    assert (answer.tokens, answer.finish_reason) == (tokens[: stop + 1], "stop")
    (copied / "generation_config.json").write_text(json.dumps(said))
    assert tokens[0] not in sv.load(copied).ask(None, "Hello", max_tokens=12).tokens
    (copied / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    sampling = sv.load(copied).defaults.options
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 50)
    (copied / "generation_config.json").write_text("[1]")
    with pytest.raises(sv.ConfigurationError, match="not an object"):
        sv.load(copied)


def test_docling_answers_keep_their_markup(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "smolvlm", seed=3, processor=True)
    build_tokenizer(folder, extra_tokens=("<doctag>", "</doctag>"))
    vlm = sv.load(folder)
    markup = vlm.processor.tokenizer.convert_tokens_to_ids("<doctag>")
    end = vlm.processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    answer = vlm.ask(None, "Convert.", max_tokens=3, logit_bias={markup: 1000.0})
    assert answer.text == "<doctag>" * 3
    answer = vlm.ask(None, "Convert.", max_tokens=3, logit_bias={end: 1000.0})
    assert (answer.text, answer.finish_reason, answer.tokens) == ("", "stop", (end,))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dtype": "float33"}, "dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "abacus"}, "device"),
        ({"threads": 0}, "threads"),
        ({"quantize": "int3"}, "quantize"),
        ({"quantize": "int8", "dtype": "float32"}, "bfloat16"),
        ({"quantize": "int8", "packed": False}, "packed"),
    ],
)
def test_bad_loading_arguments_are_named(folder: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(sv.ConfigurationError, match=named):
        sv.load(folder, **arguments)


def test_a_cache_too_small_is_said(folder: Path) -> None:
    with pytest.raises(sv.CapacityError, match="kv_bytes"):
        sv.load(folder, engine=sv.EngineConfig(kv_bytes=1000))
    with pytest.raises(sv.FetchError):
        sv.load("/nowhere/at/all")


def test_the_fast_path_is_taken_where_it_can_be(folder: Path) -> None:
    if not kernels.available():
        pytest.skip("the kernels were not built here")
    vlm = sv.load(folder, dtype="bfloat16", quantize="int8")
    assert isinstance(vlm.engine.backend, CpuRunner)
    assert vlm.ask(photo(1), "What?", **OPEN_END).usage.completion_tokens == 12
    assert isinstance(sv.load(folder, dtype="bfloat16", packed=False).engine.backend, ModelRunner)


def test_containers_limits_are_obeyed(tmp_path: Path) -> None:
    assert 1 <= cpu_count(tmp_path) <= 4096
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_count(tmp_path) == min(2, cpu_count(tmp_path / "none"))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cpu_count(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_count(tmp_path) == cpu_count(tmp_path / "none")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert available_memory(tmp_path) == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 600000


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_the_own_group_and_of_those_around_it_are_obeyed(tmp_path: Path) -> None:
    """A systemd service, and a container that shares its host's groups, are not at the root of what is mounted."""
    free, member, root = cpu_count(tmp_path / "none", tmp_path / "no"), tmp_path / "member", tmp_path / "v2"
    group(root / "system.slice" / "vlm.service", cpu__max="max 100000", memory__max="max")
    (root / "system.slice" / "cpu.max").write_text("100000 100000\n")
    (root / "system.slice" / "memory.max").write_text("5000\n")
    group(root / "other", cpu__max="1000 100000", memory__max="1")
    member.write_text("0::/system.slice/vlm.service\n")
    assert cpu_count(root, member) == 1
    assert available_memory(root, membership=member) == 5000
    member.write_text("0::/\n")
    assert cpu_count(root, member) == free
    assert available_memory(root, membership=member) > 5000
    older = tmp_path / "v1"
    group(older / "cpu,cpuacct" / "docker" / "a1", **{"cpu__cfs_quota_us": "50000", "cpu__cfs_period_us": "100000"})
    group(older / "memory" / "docker" / "a1", memory__limit_in_bytes="9000", memory__usage_in_bytes="1000")
    member.write_text("12:pids:/docker/a1\n4:cpu,cpuacct:/docker/a1\n3:memory:/docker/a1\n")
    assert cpu_count(older, member) == 1
    assert available_memory(older, membership=member) == 8000
    member.write_text("nonsense\n::\n")
    assert cpu_count(older, member) == free


def test_digests_are_of_content(tmp_path: Path) -> None:
    image = photo(0)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    (tmp_path / "b.png").write_bytes(buffer.getvalue())
    assert content_digest(tmp_path / "a.png") == content_digest(str(tmp_path / "b.png"))
    assert content_digest(image) == content_digest(image.copy()) != content_digest(image.convert("L"))
    array = np.asarray(image)
    assert content_digest(array) != content_digest(array.reshape(-1, 3)) != content_digest(array[:, ::-1])
    assert content_digest(torch.from_numpy(array.copy())) != content_digest(torch.from_numpy(array / 255.0))
    assert content_digest(array, "low") != content_digest(array, "high")
    assert content_digest([array, array]) != content_digest([array])
    assert content_digest(buffer) != content_digest(buffer), "an open file is never taken for another one"


def test_loading_imports_neither_a_compiler_nor_transformers(folder: Path) -> None:
    code = (
        "import sys, smolvlm_fms as sv\n"
        f"sv.load({str(folder)!r}, dtype='bfloat16').ask(None, 'Hello', max_tokens=2)\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'transformers', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_masks_are_judged_rightly() -> None:
    """Whether the last axes really repeat one number or only seem to."""
    tiles = torch.tensor([[1, 1, 0]])[..., None, None]
    assert not prepare._all_real(tiles.expand(-1, -1, 8, 8)) and prepare._all_real(tiles[:, :2].expand(-1, -1, 8, 8))
    whole = torch.ones(1, 2, 8, 8, dtype=torch.long)
    assert prepare._all_real(whole)
    whole[0, 1, 7, 7] = 0
    assert not prepare._all_real(whole)
