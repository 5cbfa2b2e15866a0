"""Videos, several pictures, words alone and all of them mixed, as training data: what inference makes of them, too."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smolvlm_fms.errors import InputError, PromptError, VideoError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.processing.processor import SmolVLMProcessor
from smolvlm_fms.processing.video import VideoMetadata
from smolvlm_fms.training import IGNORE
from smolvlm_fms.training.config import DataConfig, SourceConfig, TrainConfig
from smolvlm_fms.training.conversation import Encoder, read_record
from smolvlm_fms.training.feed import PlannedBatches, read_samples
from smolvlm_fms.training.loss import shifted_targets, token_loss
from smolvlm_fms.training.preflight import preflight
from smolvlm_fms.training.run import prepare, train
from tests.unit.test_train_run import settings
from tests.unit.training_helpers import read_lines, tiny_checkpoint
from tests.videos import make_video


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def processor(base: Path) -> SmolVLMProcessor:
    return SmolVLMProcessor.from_pretrained(base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a video and frames of one."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "clip.mp4").write_bytes(make_video(50, fps=10, left_half=200))
    for number in range(4):
        Image.new("RGB", (70, 40 + 9 * number), (60 * number, 90, 120)).save(folder / f"{number}.png")
    return folder


IMAGE: list[dict[str, Any]] = [{"type": "image", "path": "0.png"}]
TWO: list[dict[str, Any]] = [*IMAGE, {"type": "text", "text": "and"}, {"type": "image", "path": "1.png"}]
CLIP: list[dict[str, Any]] = [{"type": "video", "path": "clip.mp4"}]
KINDS = {
    "words": [],
    "picture": IMAGE,
    "pictures": TWO,
    "video": CLIP,
    "both": [*IMAGE, *CLIP],
    "turned": [*CLIP, *TWO],
}


def record(parts: list[dict[str, Any]], answer: str = "A grey room.") -> dict[str, Any]:
    asked = [*parts, {"type": "text", "text": "What is there?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [{"role": "user", "content": asked}, said]}


def here(parts: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return [{**part, "path": str(folder / part["path"])} if "path" in part else part for part in parts]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_what_the_processor_makes_of_a_chat(kind: str, processor: SmolVLMProcessor, folder: Path) -> None:
    encoder = Encoder(processor, max_length=400)
    conversation = read_record(record(KINDS[kind]), folder, "one")
    sample = encoder.encode(conversation)
    chat = processor.apply_chat_template(
        record(here(KINDS[kind], folder))["messages"], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(sample.input_ids, chat["input_ids"][0])
    assert (sample.pixel_values is None) == ("pixel_values" not in chat)
    if sample.pixel_values is not None:
        assert torch.equal(sample.pixel_values, chat["pixel_values"][0]) and sample.pixel_attention_mask is None
    learnt = encoder.tokenizer.decode([int(one) for one in sample.labels if one != IGNORE])
    assert learnt == " A grey room.<end_of_utterance>"
    measured = encoder.measure(conversation)
    assert (measured.length, measured.targets, measured.problem) == (sample.length, sample.targets, "")
    assert measured.tiles == (0 if sample.pixel_values is None else len(sample.pixel_values))


def test_videos_come_as_bytes_columns_and_frames(processor: SmolVLMProcessor, folder: Path) -> None:
    encoder = Encoder(processor, max_length=400)
    wanted = encoder.encode(read_record(record(CLIP), folder, "file"))
    data = (folder / "clip.mp4").read_bytes()
    column = {**record([{"type": "video"}]), "videos": [{"bytes": data, "path": None}]}
    in_front = {**record([]), "video": "clip.mp4"}
    for one in (record([{"type": "video", "bytes": data}]), column, in_front):
        found = encoder.encode(read_record(one, folder, "bytes"))
        assert torch.equal(found.input_ids, wanted.input_ids)
        assert found.pixel_values is not None and wanted.pixel_values is not None
        assert torch.equal(found.pixel_values, wanted.pixel_values)
    pictures = ["0.png", (folder / "1.png").read_bytes(), {"path": "2.png", "bytes": None}]
    conversation = read_record(record([{"type": "video", "video": pictures, "fps": 2}]), folder, "frames")
    sample = encoder.encode(conversation)
    frames = [np.asarray(Image.open(folder / f"{number}.png")) for number in range(3)]
    metadata = VideoMetadata(3, 2.0, duration=1.5, frames_indices=[0, 1, 2])
    clips = processor.video_processor(  # type: ignore[misc]
        [[Image.fromarray(frame) for frame in frames]], return_tensors="pt", video_metadata=[metadata]
    )
    assert sample.pixel_values is not None and torch.equal(sample.pixel_values, clips["pixel_values"][0])
    text = encoder.tokenizer.decode(sample.input_ids.tolist())
    assert "three frames from a 0:00:01" in text and "Frame from 00:01" in text
    assert encoder.measure(conversation).length == sample.length


def test_videos_come_from_shards_and_data_sets(processor: SmolVLMProcessor, folder: Path, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    encoder = Encoder(processor, max_length=400)
    files = {"0.json": json.dumps(record([])).encode(), "1.txt": b"A grey room."}
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
            archive.add(folder / "clip.mp4", f"{name[0]}.mp4")
    row = {"messages": record([])["messages"], "video": str(folder / "clip.mp4")}
    features = datasets.Features({"messages": datasets.Dataset.from_list([row]).features["messages"]})
    features["video"] = datasets.Video()
    datasets.Dataset.from_list([row], features=features).save_to_disk(str(tmp_path / "saved"))
    wanted = encoder.encode(read_record(record(CLIP), folder, "file"))
    captioned, saved = ([SourceConfig(path=str(tmp_path / name))] for name in ("data.tar", "saved"))
    asked, described = read_samples(captioned, encoder, 2)
    (row_sample,) = read_samples(saved, encoder, 1)
    for sample in (asked, row_sample):
        assert torch.equal(sample.input_ids, wanted.input_ids)
        assert sample.pixel_values is not None and wanted.pixel_values is not None
        assert torch.equal(sample.pixel_values, wanted.pixel_values)
    assert "Describe the video." in encoder.tokenizer.decode(described.input_ids.tolist())


def test_bad_videos_are_named(processor: SmolVLMProcessor, folder: Path, tmp_path: Path) -> None:
    encoder = Encoder(processor, max_length=400)
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    for name in ("bad.mp4", "gone.mp4"):
        broken = read_record(record([{"type": "video", "path": name}]), tmp_path, "bad")
        assert name in encoder.measure(broken).problem or "Video 0 cannot be read" in encoder.measure(broken).problem
        with pytest.raises(VideoError, match="Video 0 cannot be read"):
            encoder.encode(broken)
    with pytest.raises(InputError, match="no frames"):
        read_record(record([{"type": "video", "video": []}]), tmp_path, "bad")
    with pytest.raises(PromptError, match="fps is 'fast'"):
        read_record(record([{"type": "video", "path": "a", "fps": "fast"}]), tmp_path, "bad")
    with pytest.raises(InputError, match="a video part has no video"):
        read_record(record([{"type": "video"}]), tmp_path, "bad")
    still = SmolVLMProcessor(processor.image_processor, processor.tokenizer, None, processor.image_seq_len)
    with pytest.raises(VideoError, match="no settings for videos"):
        Encoder(still, 400).encode(read_record(record(CLIP), folder, "one"))


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Path:
    """Twenty-four conversations of every kind, and two whose videos cannot be read."""
    names = ["red", "blue", "green"]
    lines = [json.dumps(record(parts, names[n % 3])) for n in range(4) for parts in KINDS.values()]
    lines += [json.dumps(record([{"type": "video", "path": name}])) for name in ("gone.mp4", "0.txt")]
    path = folder / "mixed.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mixed_samples_share_rows_and_lose_nothing(mixed: Path, base: Path, processor: SmolVLMProcessor) -> None:
    encoder = Encoder(processor, max_length=400)
    config = DataConfig(train=[SourceConfig(path=str(mixed))], max_length=400, rows=2, workers=1)
    plan, report = preflight(config, encoder, 0, None)
    assert report.sources[0].used == 24 and report.sources[0].dropped == {"unreadable video": 2}
    model = load_model(base)
    source = plan.sources[0].source
    with torch.no_grad():
        alone = torch.zeros(())
        for index in range(24):
            sample = encoder.encode(source.read(index))  # type: ignore[union-attr]
            pixels = None if sample.pixel_values is None else sample.pixel_values[None]
            targets = shifted_targets(sample.labels[None])[0]
            logits = model(sample.input_ids[None], pixels)[0]
            alone += token_loss(logits[targets != IGNORE], targets[targets != IGNORE])[1]
    from smolvlm_fms.training.evaluate import model_inputs

    batches = list(plan._group(islice(plan.draws(), 24), flush=True))
    make = PlannedBatches(plan, encoder, 2, workers=0).make
    packed = torch.zeros(())
    with torch.no_grad():
        for batch in map(make, batches):
            targets = shifted_targets(batch["labels"], batch["segments"])
            mask = targets != IGNORE
            packed += token_loss(model(**model_inputs(batch), logits_mask=mask), targets[mask])[1]
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)


def test_worker_processes_give_the_same_batches(mixed: Path, processor: SmolVLMProcessor) -> None:
    config = DataConfig(train=[SourceConfig(path=str(mixed))], max_length=400, rows=2, workers=0)
    encoder = Encoder(processor, max_length=400)
    plan, _ = preflight(config, encoder, 0, None)
    here, there = (
        [batch for batch, _ in zip(PlannedBatches(plan, encoder, 2, n).stream(3), range(3), strict=False)]
        for n in (0, 1)
    )
    for mine, other in zip(here, there, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_run_learns_from_all_kinds_together(mixed: Path, base: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "steps": 16, "optim": {"lr": 1e-2}, "data": {"max_length": 400, "eval": [{"path": str(mixed)}]},
        "eval": {"every": 0, "loss_samples": 12, "generations": 6},
    }  # fmt: skip
    train(TrainConfig(**settings(tmp_path / "run", base, mixed, **changes)), say=lambda line: None)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["eval_loss"] < lines[0]["loss"] - 2
    assert len(read_lines(tmp_path / "run" / "samples.jsonl")) == 6
    _, report = prepare(TrainConfig(**settings(tmp_path / "run", base, mixed, **changes)))
    assert any("2 left out, unreadable video" in line for line in report.lines())
