"""The processor as a whole: batches of every kind, conversations, files and errors, without a peer."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smolvlm_fms.errors import ConfigurationError, FetchError, InputError, PromptError, TokenCountError, VideoError
from smolvlm_fms.processing.processor import SmolVLMProcessor, process_inputs
from tests.tiny import build_processor_files
from tests.videos import make_video


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


WIDE, TALL, SMALL = picture(50, 80), picture(100, 30, 1), picture(20, 20, 2)
CLIP = np.random.default_rng(3).integers(0, 256, (3, 3, 40, 50), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_processor_files(tmp_path_factory.mktemp("processor"), padding_side="left")


@pytest.fixture(scope="module")
def processor(folder: Path) -> SmolVLMProcessor:
    return SmolVLMProcessor.from_pretrained(folder)


def image_tokens(batch: Any, processor: SmolVLMProcessor) -> list[int]:
    return (batch["input_ids"] == processor.image_token_id).sum(1).tolist()


def tiles(batch: Any) -> list[int]:
    return batch["pixel_attention_mask"].flatten(2).any(-1).sum(1).tolist()


def test_every_row_has_the_tokens_of_its_tiles(processor: SmolVLMProcessor) -> None:
    batch = processor(
        text=["<image>a<image>", "no picture", "<image>", "<image> and a longer question"],
        images=[[WIDE, TALL], [], [SMALL], [WIDE]],
        padding=True,
        return_tensors="pt",
    )
    assert image_tokens(batch, processor) == [count * processor.image_seq_len for count in tiles(batch)]
    assert tiles(batch)[1] == 0 and batch.pixel_values.shape[0] == 4
    assert batch.attention_mask[1].tolist() == sorted(batch.attention_mask[1].tolist())  # padded on the left


def test_a_row_does_not_depend_on_its_neighbours(processor: SmolVLMProcessor) -> None:
    alone = processor(text="<image>Why?", images=SMALL, return_tensors="pt")
    batch = processor(text=["<image>Why?", "<image><image>"], images=[[SMALL], [WIDE, TALL]], padding=True,
                      return_tensors="pt")  # fmt: skip
    count = tiles(alone)[0]
    assert torch.equal(batch.pixel_values[0, :count], alone.pixel_values[0])
    assert not batch.pixel_values[0, count:].any()
    assert batch.input_ids[0][batch.attention_mask[0] == 1].tolist() == alone.input_ids[0].tolist()


def test_a_flat_list_is_dealt_out_by_the_placeholders(processor: SmolVLMProcessor) -> None:
    texts = ["<image>", "none", "<image><image>"]
    flat = processor(text=texts, images=[WIDE, TALL, SMALL], padding=True, return_tensors="pt")
    nested = processor(text=texts, images=[[WIDE], [], [TALL, SMALL]], padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in nested)


def test_pictures_and_videos_in_one_batch(processor: SmolVLMProcessor) -> None:
    texts = ["<video>What?", "<image>And<video>this<image>", "nothing", "<video><video>"]
    images, videos = [[], [SMALL, WIDE], [], []], [CLIP, CLIP[:2], CLIP[:1], CLIP]
    batch = processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt")
    assert image_tokens(batch, processor) == [count * processor.image_seq_len for count in tiles(batch)]
    small, wide = processor(images=[SMALL], return_tensors="pt"), processor(images=[WIDE], return_tensors="pt")
    frames = processor(videos=CLIP, return_tensors="pt").pixel_values[0]
    expected = torch.cat([small.pixel_values[0], frames[:2], wide.pixel_values[0]])
    assert torch.equal(batch.pixel_values[1, : len(expected)], expected)
    assert tiles(batch)[2] == 0 and tiles(batch)[3] == 4
    lists = processor(text=texts, images=images, videos=videos)
    assert torch.equal(lists["pixel_values"][1], batch.pixel_values[1])
    arrays = processor(text=texts, images=images, videos=videos, padding=True, return_tensors="np")
    assert np.array_equal(arrays["pixel_values"], batch.pixel_values.numpy())


def test_ragged_videos_state_their_own_counts(processor: SmolVLMProcessor) -> None:
    batch = processor(text=["<video>", "<video>"], videos=[CLIP, CLIP[:2]], padding=True, return_tensors="pt")
    texts = processor.batch_decode(batch.input_ids)
    assert "of three frames" in texts[0] and "of two frames" in texts[1]
    assert texts[1].count("Frame from") == 2 and tiles(batch) == [3, 2]


def test_every_video_source_through_a_chat(processor: SmolVLMProcessor, tmp_path: Path) -> None:
    data = make_video(35, fps=10)
    (tmp_path / "a.mp4").write_bytes(data)
    for part in ({"path": str(tmp_path / "a.mp4")}, {"video": data}, {"video": tmp_path / "a.mp4"},
                 {"url": "data:video/mp4;base64," + base64.b64encode(data).decode()}):  # fmt: skip
        conversation = [{"role": "user", "content": [{"type": "video", **part}, {"type": "text", "text": "What?"}]}]
        batch = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        text = processor.decode(batch.input_ids[0])
        assert "series of four frames from a 0:00:03 [H:MM:SS] video." in text and "Frame from 00:02:" in text
        assert text.endswith("What?<end_of_utterance>\nAssistant:")
        assert batch.pixel_values.shape == (1, 4, 3, 32, 32)
    more = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"fps": 2, "num_frames": 6}
    )
    assert more.pixel_values.shape[1] == 6
    frames = [{"role": "user", "content": [{"type": "video", "video": CLIP}]}]
    assert processor.apply_chat_template(frames, tokenize=True, return_dict=True)["pixel_values"][0].shape[0] == 3


def test_frames_in_a_chat_may_say_their_rate(processor: SmolVLMProcessor, caplog: pytest.LogCaptureFixture) -> None:
    """The prompt is that of a call with the same video_metadata, and nothing has to be assumed."""

    def chat(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]

    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    said = chat({"type": "video", "video": CLIP, "fps": 0.5}, {"type": "video", "video": CLIP[:2], "fps": 30})
    batch = processor.apply_chat_template(said, **how)
    text = processor.decode(batch.input_ids[0])
    assert [part[:5] for part in text.split("Frame from ")[1:]] == ["00:00", "00:02", "00:04", "00:00", "00:00"]
    assert "of three frames from a 0:00:06 [H:MM:SS] video" in text
    assert not caplog.records, "nothing is assumed"
    known = [
        {"total_num_frames": 3, "fps": 0.5, "duration": 6.0},
        {"total_num_frames": 2, "fps": 30, "duration": 2 / 30},
    ]
    bare = chat({"type": "video", "video": CLIP}, {"type": "video", "video": CLIP[:2]})
    again = processor.apply_chat_template(bare, processor_kwargs={"video_metadata": known}, **how)
    assert torch.equal(again.input_ids, batch.input_ids)
    one = processor.apply_chat_template([said, chat({"type": "text", "text": "Hi"})], padding=True, **how)
    assert torch.equal(one.input_ids[0], batch.input_ids[0])
    sampled = processor.apply_chat_template(
        chat({"type": "video", "video": CLIP, "fps": 1}), processor_kwargs={"fps": 1, "num_frames": 2}, **how
    )
    assert sampled.pixel_values.shape[1] == 2
    for wrong, message in (
        ({"fps": 0}, "0 came"),
        ({"fps": "2"}, "'2' came"),
        ({"video": "a.mp4"}, "a file has its own"),
    ):
        with pytest.raises(PromptError, match=message):
            processor.apply_chat_template(chat({"type": "video", "video": CLIP, "fps": 2} | wrong), **how)


def test_every_picture_source_through_a_chat(processor: SmolVLMProcessor, tmp_path: Path) -> None:
    SMALL.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    text64 = base64.b64encode(data).decode()
    expected = processor(images=[SMALL], return_tensors="pt").pixel_values
    uri = f"data:image/png;base64,{text64}"
    for part in ({"image": SMALL}, {"path": str(tmp_path / "a.png")}, {"image": data}, {"base64": text64},
                 {"url": uri}, {"image": np.asarray(SMALL)}, {"image": io.BytesIO(data)}):  # fmt: skip
        conversation = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "What?"}]}]
        batch = processor.apply_chat_template(
            [conversation], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert torch.equal(batch.pixel_values, expected)
    openai = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    assert "pixel_values" in processor.apply_chat_template(openai, tokenize=True, return_dict=True)


def test_the_seeds_batch_of_three_conversations(processor: SmolVLMProcessor) -> None:
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "Describe this."}]}],
        [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "image", "image": TALL},
                                      {"type": "text", "text": "What is written?"}]}],
        [{"role": "user", "content": "who are you?"}],
    ]  # fmt: skip
    batch = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    assert list(batch) == ["input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"]
    assert image_tokens(batch, processor) == [count * processor.image_seq_len for count in tiles(batch)]
    assert "User: who are you?" in processor.batch_decode(batch.input_ids)[2]
    moved = batch.to("cpu", dtype=torch.bfloat16)
    assert moved.pixel_values.dtype == torch.bfloat16 and moved.input_ids.dtype == torch.int64
    ids = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
    assert [len(row) for row in ids] == batch.attention_mask.sum(1).tolist()


def test_pictures_can_come_beside_the_conversation(processor: SmolVLMProcessor) -> None:
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    inside = [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "What?"}]}]
    call: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    beside = processor.apply_chat_template(conversation, processor_kwargs={"images": [WIDE]}, **call)
    assert torch.equal(beside.pixel_values, processor.apply_chat_template(inside, **call).pixel_values)
    with pytest.raises(PromptError, match="no picture was passed"):
        processor.apply_chat_template(conversation, **call)


def test_assistant_words_are_marked_behind_a_grown_picture(processor: SmolVLMProcessor) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% elif m['role'] == 'assistant' %}{% generation %}{{ p['text'] }}{% endgeneration %}"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    batch = processor.apply_chat_template(
        [conversation, conversation[2:]], template, tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=True, padding=True,
    )  # fmt: skip
    marked = [
        processor.decode(row[mask.bool()]) for row, mask in zip(batch.input_ids, batch.assistant_masks, strict=True)
    ]
    assert marked == ["A red square.Yes.", "Yes."]
    assert "offset_mapping" not in batch and "text_replacement_offsets" not in batch


def test_one_call_from_pictures_and_text(processor: SmolVLMProcessor) -> None:
    batch = process_inputs(processor, WIDE, "What is this?")
    assert list(batch) == ["input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"]
    text = processor.decode(batch.input_ids[0])
    assert text.startswith("<|im_start|>User:<fake_token_around_image>") and text.endswith("\nAssistant:")
    raw = process_inputs(processor, [[WIDE], []], ["<image>It is", "plain"])
    assert raw.input_ids.shape[0] == 2 and processor.decode(raw.input_ids[0]).endswith("It is")
    assert list(process_inputs(processor, text="Hello")) == ["input_ids", "attention_mask"]
    with pytest.raises(PromptError, match="one list a text"):
        process_inputs(processor, [WIDE, TALL], ["a", "b"])


def test_samples_become_a_batch(processor: SmolVLMProcessor) -> None:
    batch = processor.create_batch(
        [{"text": "Which?", "images": [WIDE, TALL]}, {"text": "Hello"}, {"text": "<video>", "videos": [CLIP]}]
    )
    assert image_tokens(batch, processor) == [count * processor.image_seq_len for count in tiles(batch)]
    assert tiles(batch)[1:] == [0, 3]
    with pytest.raises(InputError, match="Sample 1"):
        processor.create_batch([{"text": "a"}, {"images": [WIDE]}])


def test_token_types_mark_pictures(folder: Path, processor: SmolVLMProcessor) -> None:
    call: dict[str, Any] = {"text": ["<image>a", "b"], "images": [[WIDE], []], "padding": True, "return_tensors": "pt",
                            "return_mm_token_type_ids": True}  # fmt: skip
    batch = processor(**call)
    assert torch.equal(batch.mm_token_type_ids == 1, batch.input_ids == processor.image_token_id)
    idefics = SmolVLMProcessor.from_pretrained(folder, family="idefics3")(**call)
    row = idefics.mm_token_type_ids[0]
    assert int(row.sum()) > int((idefics.input_ids[0] == processor.image_token_id).sum())
    assert processor.decode(idefics.input_ids[0][row == 0]).endswith("a")


def test_docling_answers_keep_their_markup(tmp_path: Path, processor: SmolVLMProcessor) -> None:
    folder = build_processor_files(tmp_path, model_type="idefics3", transformers_major=4,
                                   extra_tokens=("<doctag>", "</doctag>", "<loc_0>"))  # fmt: skip
    docling = SmolVLMProcessor.from_pretrained(folder)
    assert docling.keep_special_tokens and docling.family == "idefics3" and not processor.keep_special_tokens
    answer = docling.tokenizer("<doctag><loc_0>Hi</doctag><end_of_utterance><|im_end|>")["input_ids"]
    assert docling.post_process_image_text_to_text([answer]) == ["<doctag><loc_0>Hi</doctag>"]
    assert docling.post_process_image_text_to_text(torch.tensor(answer)) == ["<doctag><loc_0>Hi</doctag>"]
    assert docling.post_process_image_text_to_text([answer], skip_special_tokens=True) == ["Hi"]
    plain = processor.tokenizer("Hi<end_of_utterance>")["input_ids"]
    assert processor.post_process_image_text_to_text([plain]) == ["Hi"]
    with pytest.raises(VideoError, match="not trained on videos"):
        docling(text="<video>", videos=CLIP)


@pytest.mark.parametrize("major", [4, 5])
@pytest.mark.parametrize("model_type", ["smolvlm", "idefics3"])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, major: int, model_type: str) -> None:
    folder = build_processor_files(tmp_path / "a", transformers_major=major, model_type=model_type, tile=40)
    first = SmolVLMProcessor.from_pretrained(folder, padding_side="left")
    written = first.save_pretrained(tmp_path / "b")
    second = SmolVLMProcessor.from_pretrained(tmp_path / "b")
    assert all(Path(file).is_file() for file in written)
    assert (second.chat_template, second.image_seq_len, second.family) == (first.chat_template, 4, model_type)
    call: dict[str, Any] = {"text": ["<image>", "hi"], "images": [[WIDE], []], "padding": True, "return_tensors": "pt"}
    one, two = first(**call), second(**call)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert second.tokenizer.padding_side == "left" and (second.video_processor is None) == (model_type == "idefics3")


def test_templates_by_name_and_where_they_are_found(tmp_path: Path, processor: SmolVLMProcessor) -> None:
    folder = build_processor_files(tmp_path / "a", template=None)
    none = SmolVLMProcessor.from_pretrained(folder)
    message = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    with pytest.raises(PromptError, match="no chat template"):
        none.apply_chat_template(message)
    none.chat_template = {"short": "{{ messages[0]['role'] }}"}
    with pytest.raises(PromptError, match="no default"):
        none.apply_chat_template(message)
    assert none.apply_chat_template(message, "short") == "user"
    none.save_pretrained(tmp_path / "b")
    again = SmolVLMProcessor.from_pretrained(tmp_path / "b")
    assert again.apply_chat_template([message, message], "short") == ["user", "user"]
    none.chat_template = {"../up": "x"}
    with pytest.raises(PromptError, match="cannot be named"):
        none.save_pretrained(tmp_path / "c")
    assert processor.apply_chat_template(message, "{{ colour }}", colour="red") == "red"


def test_the_token_count_comes_from_the_model_where_the_file_is_silent(tmp_path: Path) -> None:
    folder = build_processor_files(tmp_path)
    (folder / "processor_config.json").write_text("{}")
    assert SmolVLMProcessor.from_pretrained(folder).image_seq_len == 169
    assert SmolVLMProcessor.from_pretrained(folder, image_seq_len=7).image_seq_len == 7
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 0}))
    with pytest.raises(ConfigurationError, match="image_seq_len is 0"):
        SmolVLMProcessor.from_pretrained(folder)


def test_options_reach_their_part(processor: SmolVLMProcessor) -> None:
    whole = processor(text="<image>", images=WIDE, do_image_splitting=False, return_tensors="pt")
    inner = processor(text="<image>", images=WIDE, images_kwargs={"do_image_splitting": False}, return_tensors="pt")
    common = processor(text="<image>", images=WIDE, common_kwargs={"return_tensors": "pt"}, do_image_splitting=False)
    assert tiles(whole) == tiles(inner) == tiles(common) == [1]
    assert torch.equal(whole.pixel_values, common.pixel_values)
    padded = processor(text="hi", text_kwargs={"padding": "max_length", "max_length": 9, "return_tensors": "pt"})
    assert padded.input_ids.shape == (1, 9)
    longer = processor(text="<image>", images=SMALL, image_seq_len=9, return_tensors="pt")
    assert image_tokens(longer, processor) == [9 * count for count in tiles(longer)]
    offsets = processor(text="a<image>", images=SMALL, return_text_replacement_offsets=True)
    assert offsets["text_replacement_offsets"][0][0]["span"] == (1, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({}, InputError, "Nothing to process"),
        ({"images": [], "videos": []}, InputError, "Nothing to process"),
        ({"images": WIDE, "videos": CLIP}, InputError, "need a text"),
        ({"text": []}, PromptError, "empty"),
        ({"text": 3}, PromptError, "Text 0 must be a string, got int"),
        ({"text": ["a", None]}, PromptError, "Text 1 must be a string"),
        ({"text": "<image>"}, PromptError, "no picture was passed"),
        ({"text": "hello", "images": WIDE}, PromptError, "Text 0 holds 0"),
        ({"text": ["<image>", "b"], "images": [[WIDE, TALL], []]}, PromptError, "Text 0 holds 1"),
        ({"text": "<video>"}, PromptError, "0 video"),
        ({"text": "hello", "videos": CLIP}, PromptError, "0 <video>"),
        ({"text": "<image>", "images": WIDE, "truncation": True, "max_length": 9}, TokenCountError, "left after"),
        ({"text": "a", "padings": True}, ConfigurationError, "Did you mean padding"),
        ({"text": "a", "images_kwargs": {"do_splitting": True}}, ConfigurationError, "images_kwargs has no argument"),
        ({"text": "a", "padding": True, "text_kwargs": {"padding": True}}, ConfigurationError, "passed twice"),
        ({"text": "a", "audio": [1]}, ConfigurationError, "does not hear"),
        ({"text": ["a", "a b c"], "return_tensors": "pt"}, InputError, "padding=True"),
    ],
)
def test_calls_that_cannot_be_answered(processor: SmolVLMProcessor, call: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        processor(**call)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "path": "a.wav"}, "does not hear"),
        ({"type": "imag", "path": "a.png"}, "no place for a part of type 'imag'"),
        ({"type": "text"}, "needs its words"),
        ({"path": "a.png"}, "'type'"),
    ],
)
def test_parts_that_would_vanish(processor: SmolVLMProcessor, part: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        processor.apply_chat_template([{"role": "user", "content": [part]}])


def test_conflicting_wishes(processor: SmolVLMProcessor) -> None:
    message = [{"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    assert processor.apply_chat_template(message, continue_final_message=True).endswith("Assistant: It is")
    with pytest.raises(PromptError, match="goes with neither"):
        processor.apply_chat_template(message, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(PromptError, match="does not hear"):
        processor.apply_chat_template(message, load_audio_from_video=True)


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (tmp_path / "nothing", "no-such-name", "a/b/c"):
        with pytest.raises(FetchError, match="no such folder"):
            SmolVLMProcessor.from_pretrained(name)
    with pytest.raises(FetchError, match="could not be fetched"):
        SmolVLMProcessor.from_pretrained("nobody/no-model", local_files_only=True, cache_dir=str(tmp_path))
    with pytest.raises(FetchError, match=r"tokenizer\.json"):
        SmolVLMProcessor.from_pretrained(tmp_path)
    folder = build_processor_files(tmp_path / "a")
    with pytest.raises(ConfigurationError, match="no option 'colour'"):
        SmolVLMProcessor.from_pretrained(folder, colour="red")
    with pytest.raises(ConfigurationError, match="needs a tokenizer"):
        SmolVLMProcessor()
    with pytest.raises(ConfigurationError, match="family"):
        SmolVLMProcessor.from_pretrained(folder, family="llava")
