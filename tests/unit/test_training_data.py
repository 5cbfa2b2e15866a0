"""Records to conversations, conversations to tensors, sources to plans, and what the preflight says of them."""

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

from smolvlm_fms.errors import ConfigurationError, FetchError, InputError, PromptError, TrainingError
from smolvlm_fms.processing.processor import SmolVLMProcessor
from smolvlm_fms.training import IGNORE, Sample, collate
from smolvlm_fms.training.config import DataConfig, SourceConfig
from smolvlm_fms.training.conversation import Conversation, Encoder, read_record
from smolvlm_fms.training.evaluate import model_inputs
from smolvlm_fms.training.feed import PlannedBatches, read_samples
from smolvlm_fms.training.loss import shifted_targets
from smolvlm_fms.training.plan import Draw, Plan, pack_rows
from smolvlm_fms.training.preflight import epoch_draws, preflight
from smolvlm_fms.training.samples import collate_packed
from smolvlm_fms.training.sources import Stream, open_source, order
from tests.tiny import build_processor_files
from tests.unit.training_helpers import tiny_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SmolVLMProcessor:
    folder = build_processor_files(tmp_path_factory.mktemp("processor"), longest_edge=64)
    return SmolVLMProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(processor: SmolVLMProcessor) -> Encoder:
    return Encoder(processor, max_length=200)


def picture(folder: Path, name: str = "a.png", size: tuple[int, int] = (40, 30), colour: int = 0) -> Path:
    path = folder / name
    Image.new("RGB", size, (colour, 99, 200)).save(path)
    return path


def talk(question: str, answer: str, pictures: list[Any] | None = None) -> dict[str, Any]:
    content = [{"type": "image", "path": str(one)} for one in pictures or []] + [{"type": "text", "text": question}]
    answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [{"role": "user", "content": content}, answered]}


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def learnt_text(encoder: Encoder, sample: Sample) -> str:
    return str(encoder.tokenizer.decode([int(one) for one in sample.labels if one != IGNORE]))


def test_only_the_assistants_words_are_learnt(encoder: Encoder, tmp_path: Path) -> None:
    record = talk("What is it?", "A red circle.", [picture(tmp_path)])
    record["messages"] += [
        {"role": "user", "content": "And how many?"},
        {"role": "assistant", "content": "Three."},
    ]
    sample = encoder.encode(read_record(record, tmp_path, "one"))
    end = "<end_of_utterance>"
    assert learnt_text(encoder, sample) == f" A red circle.{end} Three.{end}"
    assert sample.pixel_values is not None and sample.pixel_values.dtype == torch.float32
    images = sample.input_ids == encoder.image_token_id
    assert int(images.sum()) == len(sample.pixel_values) * 4 and bool((sample.labels[images] == IGNORE).all())


def test_turns_of_weight_zero_are_not_learnt(encoder: Encoder, tmp_path: Path) -> None:
    record = talk("Hello", "Hi.")
    record["messages"][1]["weight"] = 0
    record["messages"] += [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Goodbye."}]
    assert learnt_text(encoder, encoder.encode(read_record(record, tmp_path, "one"))).startswith(" Goodbye.")


def test_measuring_needs_headers_only_and_agrees_with_encoding(encoder: Encoder, tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (64, 20)).save(turned, exif=exif)
    for shown in (picture(tmp_path, size=(90, 20)), turned, turned.read_bytes()):
        conversation = read_record({**talk("What?", "This."), "images": [shown]}, tmp_path, "one")
        measured, sample = encoder.measure(conversation), encoder.encode(conversation)
        assert (measured.length, measured.targets) == (sample.length, sample.targets)
        assert sample.pixel_values is not None and measured.tiles == len(sample.pixel_values)


def test_records_of_other_shapes(tmp_path: Path) -> None:
    path = picture(tmp_path)
    cauldron = {"images": [{"bytes": path.read_bytes(), "path": None}], "texts": [{"user": "Q", "assistant": "A"}]}
    read = read_record(cauldron, tmp_path, "c")
    assert [part["type"] for part in read.messages[0]["content"]] == ["image", "text"]
    assert read.pictures == [path.read_bytes()]
    filled = read_record({**talk("Q", "A"), "image": "a.png"}, tmp_path, "f")
    assert filled.pictures == [str(path)]
    with pytest.raises(InputError, match="needs 'messages'"):
        read_record({"text": "x"}, tmp_path, "bad")
    with pytest.raises(InputError, match="cannot be trained on"):
        read_record({"messages": [{"role": "user", "content": [{"type": "audio", "path": "a"}]}]}, tmp_path, "bad")
    part = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(InputError, match="has no picture"):
        read_record({"messages": [part]}, tmp_path, "bad")
    with pytest.raises(InputError, match="belong to no image part"):
        read_record({"messages": [part], "images": ["a", "b"]}, tmp_path, "bad")


def test_long_samples_are_never_cut_through_a_picture(
    processor: SmolVLMProcessor, encoder: Encoder, tmp_path: Path
) -> None:
    shown = picture(tmp_path, size=(64, 64))
    text_last = read_record(talk("What?", "word " * 300, [shown]), tmp_path, "a")
    picture_last = read_record(talk("word " * 300, "This.", None), tmp_path, "b")
    picture_last.messages[0]["content"].append({"type": "image"})
    picture_last.pictures.append(str(shown))
    with pytest.raises(PromptError, match="more than max_length 200"):
        encoder.encode(text_last)
    cutter = Encoder(processor, 200, cut=True)
    assert cutter.encode(text_last).length == 200 and cutter.measure(text_last).cut
    with pytest.raises(PromptError, match="would cut into a picture"):
        cutter.encode(picture_last)
    assert "no answer" in cutter.measure(read_record(talk("word " * 300, "This."), tmp_path, "c")).problem


def _records(folder: Path, count: int) -> list[dict[str, Any]]:
    return [
        talk(f"Number {n}?", "one " * (1 + n % 7), [picture(folder, f"{n}.png", colour=n)] if n % 3 else None)
        for n in range(count)
    ]


def test_every_kind_of_source_gives_the_same_samples(encoder: Encoder, tmp_path: Path) -> None:
    records = _records(tmp_path, 9)
    jsonl = write_jsonl(tmp_path / "data.jsonl", records)
    wanted = read_samples([SourceConfig(path=str(jsonl))], encoder, 9)
    assert len(wanted) == 9
    loose = []
    for record in records:
        content = record["messages"][0]["content"]
        data = [Path(part["path"]).read_bytes() for part in content if part["type"] == "image"]
        words = [{"role": m["role"], "content": [{"type": p["type"], "text": p.get("text")} for p in m["content"]]}
                 for m in record["messages"]]  # fmt: skip
        loose.append({"messages": words, "images": [{"bytes": one, "path": None} for one in data]})
    sources = [_parquet(tmp_path, loose), _shards(tmp_path, loose), _dataset(tmp_path, loose)]
    for source in sources:
        found = read_samples([source], encoder, 9)
        assert len(found) == 9, source
        for mine, other in zip(found, wanted, strict=True):
            assert torch.equal(mine.input_ids, other.input_ids) and torch.equal(mine.labels, other.labels)
            assert (mine.pixel_values is None) == (other.pixel_values is None)
            assert mine.pixel_values is None or torch.equal(mine.pixel_values, other.pixel_values)  # type: ignore[arg-type]


def _parquet(folder: Path, records: list[Any]) -> SourceConfig:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), folder / "data.parquet", row_group_size=4)
    return SourceConfig(path=str(folder / "data.parquet"))


def _shards(folder: Path, records: list[Any]) -> SourceConfig:
    for shard, part in enumerate((records[:5], records[5:])):
        with tarfile.open(folder / f"data-{shard:02d}.tar", "w") as archive:
            for number, record in enumerate(part):
                files = {f"{number:04d}.json": json.dumps({"messages": record["messages"]}).encode()}
                files |= {f"{number:04d}.{n}.png": one["bytes"] for n, one in enumerate(record["images"])}
                for name, data in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return SourceConfig(path=str(folder / "data-{00..01}.tar"))


def _dataset(folder: Path, records: list[Any]) -> SourceConfig:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).save_to_disk(str(folder / "saved"))
    return SourceConfig(path=str(folder / "saved"))


def test_a_stream_is_taken_up_where_it_was_left(encoder: Encoder, tmp_path: Path) -> None:
    records = _records(tmp_path, 7)
    (tmp_path / "stream").mkdir()
    write_jsonl(tmp_path / "stream" / "train.jsonl", records)
    config = SourceConfig(path=str(tmp_path / "stream"), kind="stream", weight=1)
    source = open_source(config)
    assert isinstance(source, Stream)
    names = [name for name, _ in islice(source.records(0), 12)]
    assert names == [name for name, _ in islice(source.records(0), 5)] + [n for n, _ in islice(source.records(5), 7)]
    eighth = next(iter(source.records(8)))
    assert source.understand(*eighth).messages[0]["content"][-1]["text"] == "Number 1?"
    plan, report = preflight(DataConfig(train=[config], max_length=64, packing=False), encoder, 0, None)
    assert report.batches is None and report.sources[0].used == 7
    batches = PlannedBatches(plan, encoder, 2, workers=0)
    whole = [batch["input_ids"] for batch in islice(batches.stream(0), 6)]
    assert torch.equal(next(iter(batches.stream(4)))["input_ids"], whole[4])


def test_missing_and_broken_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"gone\.jsonl does not exist"):
        open_source(SourceConfig(path=str(tmp_path / "gone.jsonl")))
    with pytest.raises(FetchError, match="holds no records"):
        open_source(SourceConfig(path=str(write_jsonl(tmp_path / "empty.jsonl", []))))
    with pytest.raises(FetchError, match=r"There is no shard .*x-01\.tar"):
        (tmp_path / "x-00.tar").touch()
        open_source(SourceConfig(path=str(tmp_path / "x-{00..01}.tar")))
    with pytest.raises(ConfigurationError, match="What kind of data"):
        open_source(SourceConfig(path="somewhere"))
    (tmp_path / "bad.jsonl").write_text('{"messages": \n')
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not JSON"):
        source = open_source(SourceConfig(path=str(tmp_path / "bad.jsonl")))
        assert hasattr(source, "read")
        source.read(0)


def test_rows_are_packed_without_waste_or_loss() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    rows = pack_rows(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 128 for row in rows)
    assert len(rows) <= 1.03 * sum(lengths) / 128


class _Numbers:
    """A source that is never read, for plans alone."""

    def __init__(self, count: int, blocks: list[int] | None = None) -> None:
        self.name, self.count, self.blocks = "numbers", count, blocks or [0]

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Conversation:
        raise AssertionError


def _plan(packing: bool, rows: int = 2, **changes: Any) -> Plan:
    from smolvlm_fms.training.plan import Measured

    random = np.random.default_rng(1)
    sources = [Measured(_Numbers(n), w, random.integers(5, 60, n)) for n, w in ((100, 3.0), (40, 1.0))]
    values = {"rows": rows, "max_length": 64, "packing": packing, "window": 32, "seed": 0}
    return Plan(sources, **(values | changes))


@pytest.mark.parametrize("packing", [True, False])
def test_a_plan_is_the_same_from_any_place(packing: bool) -> None:
    plan = _plan(packing)
    whole = list(islice(plan.batches(), 60))
    assert list(islice(plan.batches(17), 10)) == whole[17:27]
    assert list(islice(plan.batches(1, 2), 20)) == whole[1:41:2]
    drawn: list[Draw] = [draw for batch in whole for row in batch for draw in row]
    share = sum(draw.source == 0 for draw in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.03)
    assert list(islice(_plan(packing, seed=1).batches(), 60)) != whole


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_uses_every_sample(packing: bool) -> None:
    plan = _plan(packing)
    draws = list(islice(plan.draws(), epoch_draws(plan)))
    assert {draw.item for draw in draws if draw.source == 0} == set(range(100))
    batches = list(plan._group(iter(draws), flush=True))
    flat = [draw for batch in batches for row in batch for draw in row]
    assert sorted(map(str, flat)) == sorted(map(str, draws)) and len(batches) == plan.count(len(draws))


def test_batches_hold_samples_of_similar_length() -> None:
    spread = [
        max(row[0].length for row in batch) - min(row[0].length for row in batch)
        for batch in islice(_plan(False, rows=4).batches(), 30)
    ]
    assert np.mean(spread) < 12, "lengths run from 5 to 60; unsorted batches of four spread over some 30"


def test_order_shuffles_blocks_and_keeps_them_near() -> None:
    source = _Numbers(160, blocks=list(range(0, 160, 10)))
    first, second = order(source, 0, 0), order(source, 1, 0)
    assert sorted(first.tolist()) == list(range(160)) and not np.array_equal(first, second)
    assert all(len({index // 10 for index in run}) == 4 for run in first.reshape(4, 40).tolist())


def test_packed_samples_do_not_see_each_other(encoder: Encoder, tmp_path: Path) -> None:
    ids = [torch.randint(5, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5, 12)]
    samples = [Sample(one, one.clone()) for one in ids]
    packed = collate_packed([samples[:2], samples[2:]], 2)
    model = tiny_model().eval()
    alone = [model(**model_inputs(collate([sample], 2))) for sample in samples]
    for masked in (True, False):
        together = model(**model_inputs(packed, masked))
        assert torch.allclose(together[0, :14], torch.cat(alone[:2], 1)[0], atol=1e-5)
        assert torch.allclose(together[1, :12], alone[2][0], atol=1e-5)
    targets = shifted_targets(packed["labels"], packed["segments"])
    assert int((targets != IGNORE).sum()) == 8 + 4 + 11
    assert int(targets[0, 8]) == IGNORE, "the last token of a sample must not predict the next one's first"


def test_the_preflight_says_what_drops_out_and_why(encoder: Encoder, tmp_path: Path) -> None:
    good = _records(tmp_path, 12)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture at all")
    bad = [
        talk("Long?", "word " * 400),
        talk("Gone?", "x", [tmp_path / "gone.png"]),
        talk("Broken?", "x", [broken]),
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        {"nothing": 1},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", good + bad)
    config = DataConfig(train=[SourceConfig(path=str(path))], max_length=200, workers=0)
    plan, report = preflight(config, encoder, 0, tmp_path / "cache")
    (source,) = report.sources
    assert (source.samples, source.used) == (17, 12)
    assert source.dropped == {
        "too long": 1, "unreadable picture": 2, "no answer to learn": 1, "broken record": 1,
    }  # fmt: skip
    text = "\n".join(report.lines())
    assert "12 of 17 samples" in text and "1 left out, too long" in text and "gone.png" in text
    batches = list(islice(PlannedBatches(plan, encoder, 2, workers=0).stream(0), report.batches))
    assert sum(int(batch["segments"].amax(1).sum()) for batch in batches) == pytest.approx(12, abs=8)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again, _ = preflight(config, encoder, 0, tmp_path / "cache")
    assert list(islice(again.batches(), 5)) == list(islice(plan.batches(), 5))
    config.too_long = "refuse"
    with pytest.raises(TrainingError, match=r"1 of 17 samples are longer than data\.max_length 200"):
        preflight(config, encoder, 0, None)
    nothing = write_jsonl(tmp_path / "nothing.jsonl", bad)
    with pytest.raises(TrainingError, match="leaves nothing to train on: all 5 samples drop out: 1 × too long"):
        preflight(DataConfig(train=[SourceConfig(path=str(nothing))], max_length=200), encoder, 0, None)


def test_a_picture_that_breaks_later_is_left_out_with_a_warning(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [talk(f"Number {n}?", "one", [picture(tmp_path, f"{n}.png")]) for n in range(4)]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    config = DataConfig(train=[SourceConfig(path=str(path))], max_length=64, workers=0, rows=4, packing=False, window=4)
    plan, _ = preflight(config, encoder, 0, None)
    data = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(data[: len(data) // 2])
    batch = next(iter(PlannedBatches(plan, encoder, 2, workers=0).stream(0)))
    assert len(batch["input_ids"]) == 3 and "2.png" in caplog.text
