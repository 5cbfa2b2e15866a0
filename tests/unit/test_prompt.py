"""Placeholders, number words and chat templates, without pixels."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvlm_fms.errors import PromptError
from smolvlm_fms.processing import chat_template
from smolvlm_fms.processing.chat_template import VIDEO_TEMPLATE, normalise_conversations, render_chat
from smolvlm_fms.processing.prompt import (
    PlaceholderTokens,
    check_counts,
    expand_placeholders,
    image_prompt,
    number_in_words,
    video_prompt,
)
from tests.tiny import PICTURE_TEMPLATE

TOKENS = PlaceholderTokens()


def test_a_tiled_picture_has_a_line_a_row_and_its_overview_last() -> None:
    assert image_prompt(2, 2, 2) == (
        "<fake_token_around_image><row_1_col_1><image><image><fake_token_around_image><row_1_col_2><image><image>\n"
        "<fake_token_around_image><row_2_col_1><image><image><fake_token_around_image><row_2_col_2><image><image>\n"
        "\n<fake_token_around_image><global-img><image><image><fake_token_around_image>"
    )


def test_an_untiled_picture_is_the_overview_alone() -> None:
    assert (
        image_prompt(0, 0, 3) == "<fake_token_around_image><global-img><image><image><image><fake_token_around_image>"
    )


@given(rows=st.integers(1, 6), cols=st.integers(1, 6), length=st.integers(1, 9))
def test_every_tile_brings_its_tokens(rows: int, cols: int, length: int) -> None:
    text = image_prompt(rows, cols, length)
    assert text.count("<image>") == (rows * cols + 1) * length
    assert text.count("\n") == rows + 1
    assert f"<row_{rows}_col_{cols}>" in text and f"<row_{rows + 1}_col_1>" not in text


def test_a_video_states_its_frames_in_words_and_stamps_each() -> None:
    text = video_prompt([0.0, 61.5], 62.9, 2, 1)
    frame = "<fake_token_around_image><global-img><image><fake_token_around_image>"
    assert text == (
        "You are provided the following series of two frames from a 0:01:02 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{frame}\nFrame from 01:01:{frame}\n\n"
    )


def test_a_video_without_a_known_length_ends_at_its_last_frame() -> None:
    assert "from a 1:00:05 [H:MM:SS]" in video_prompt([3605.2], None, 1, 1)
    with pytest.raises(PromptError, match="without frames"):
        video_prompt([], 1.0, 0, 1)


def test_number_words_are_those_of_num2words() -> None:
    num2words = pytest.importorskip("num2words").num2words
    for number in (*range(1300), 1999, 2000, 2300, 10_001, 12_345, 99_999, 100_000, 100_100, 999_999):
        assert number_in_words(number) == num2words(number)
    for number in (-1, 1_000_000):
        with pytest.raises(PromptError):
            number_in_words(number)


def test_number_words_without_the_peer() -> None:
    assert number_in_words(64) == "sixty-four"
    assert number_in_words(121) == "one hundred and twenty-one"
    assert number_in_words(2300) == "two thousand, three hundred"


def test_placeholders_are_replaced_in_order_across_the_batch() -> None:
    texts, placeholders = expand_placeholders(["a<image>b<video>", "<image>"], ["11", "2222"], ["v"])
    assert texts == ["a11bv", "2222"]
    assert [found.as_dict() for found in placeholders[0]] == [
        {"type": "image", "span": (1, 8), "new_span": (1, 3), "text": "<image>", "replacement": "11"},
        {"type": "video", "span": (9, 16), "new_span": (4, 5), "text": "<video>", "replacement": "v"},
    ]
    assert expand_placeholders(["<image>"]) == (["<image>"], [[]])


@given(st.lists(st.lists(st.sampled_from(["<image>", "<video>", "x", " <im", "\n"]), max_size=6), max_size=4))
def test_new_spans_point_at_the_replacements(parts: list[list[str]]) -> None:
    texts = ["".join(row) for row in parts]
    joined = "".join(texts)
    images = [f"«{index}»" for index in range(joined.count("<image>"))]
    videos = [f"[{index}]" for index in range(joined.count("<video>"))]
    expanded, placeholders = expand_placeholders(texts, images, videos)
    for text, found in zip(expanded, placeholders, strict=True):
        assert all(text[slice(*item.new_span)] == item.replacement for item in found)
    written = [item.replacement for row in placeholders for item in row]
    assert [item for item in written if item in images] == images


def test_too_few_and_too_many_prompts() -> None:
    with pytest.raises(PromptError, match="Text 0 holds more"):
        expand_placeholders(["<image><image>"], ["1"])
    with pytest.raises(PromptError, match=r"1 image\(s\) have no"):
        expand_placeholders(["<image>"], ["1", "2"])


@pytest.mark.parametrize(
    ("texts", "images", "videos", "message"),
    [
        (["<image>"], None, None, "no picture was passed"),
        (["", "<image>"], [1, 0], None, "Text 0 holds 0 <image> placeholder.s. but 1 picture"),
        (["<image>"], [1, 1], None, "Pictures were passed for 2"),
        (["<video>"], None, None, "1 <video> placeholder.s. but 0 video"),
        (["hello"], None, 1, "0 <video> placeholder.s. but 1 video"),
    ],
)
def test_counts_that_differ_name_the_row(
    texts: list[str], images: list[int] | None, videos: int | None, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        check_counts(texts, images, videos, TOKENS)


def test_counts_that_agree() -> None:
    check_counts(["", "<image>"], [0, 1], None, TOKENS)
    check_counts(["<video> <image>"], [1], 1, TOKENS)


def _render(messages: list[dict], template: str = PICTURE_TEMPLATE, **kwargs: object) -> str:
    conversations, _ = normalise_conversations(messages)
    return render_chat(conversations, template, **kwargs)[0][0]


def test_no_blank_before_a_picture_and_one_before_text() -> None:
    picture, words = {"type": "image"}, {"type": "text", "text": "Hi."}
    assert _render([{"role": "user", "content": [picture, words]}]) == (
        "<|im_start|>User:<image>Hi.<end_of_utterance>\n"
    )
    assert _render([{"role": "user", "content": [words]}], add_generation_prompt=True) == (
        "<|im_start|>User: Hi.<end_of_utterance>\nAssistant:"
    )


def test_a_plain_string_is_not_lost() -> None:
    # The checkpoints' template reads lists of parts only, and renders a string as nothing at all.
    assert "who are you?" in _render([{"role": "user", "content": "who are you?"}])
    text_only = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    assert _render([{"role": "user", "content": "hi"}], text_only) == "HI"


def test_the_video_template_knows_videos() -> None:
    message = {"role": "user", "content": [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "What?"}]}
    assert _render([message], VIDEO_TEMPLATE) == "<|im_start|>User: <video>What?<end_of_utterance>\n"


def test_openai_pictures_and_empty_keys() -> None:
    message = {"role": "user", "tool_calls": None, "content": [{"type": "image_url", "image_url": {"url": "u"}}]}
    conversations, batched = normalise_conversations([message])
    assert conversations == [[{"role": "user", "content": [{"type": "image", "url": "u"}]}]] and not batched
    assert message["content"] == [{"type": "image_url", "image_url": {"url": "u"}}]
    assert normalise_conversations([[message], [message]])[1]


def test_generation_blocks_are_found() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %};{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "assistant", "content": "no"},
    ]
    texts, spans = render_chat([messages], template, mark_generation=True)
    assert texts == ["U:hi;A:yes;A:no;"]
    assert [texts[0][slice(*span)] for span in spans[0]] == ["yes", "no"]
    assert render_chat([messages], template) == (texts, [[]])


def test_the_final_message_is_continued() -> None:
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "It is "}]}]
    assert _render(messages, continue_final_message=True) == "<|im_start|>Assistant: It is "
    trimmed = "{% for m in messages %}{{ m['content'] | trim }}!{% endfor %}"
    assert _render([{"role": "user", "content": "It is "}], trimmed, continue_final_message=True) == "It is"


def test_templates_see_plain_data_only() -> None:
    class Loud:
        def shout(self) -> str:
            raise AssertionError("a template reached an object")

    template = "{{ messages[0]['content'][0]['image'] }} {{ dict(a=1)['a'] }} {{ tools | tojson }}"
    message = {"role": "user", "content": [{"type": "image", "image": Loud()}]}
    assert _render([message], template, tools=[{"name": "<f>"}]) == '<Loud> 1 [{"name": "<f>"}]'
    arrays = [{"role": "user", "content": [{"type": "image", "image": np.zeros(2), "flag": np.bool_(False)}]}]
    assert _render(arrays, "{{ messages[0]['content'][0]['flag'] }}") == "False"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "does not compile"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ dict.mro() }}", "refused"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_bad_and_hostile_templates(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        _render([{"role": "user", "content": "hi"}], template)


@pytest.mark.parametrize(
    "conversation",
    [None, [], "hi", ["hi"], [{"content": "no role"}], [{"role": "user", "content": 3}],
     [{"role": "user", "content": ["hi"]}], [{"role": "user", "content": [{"text": "hi"}]}],
     [{"role": "user", "content": [{"type": "text"}]}]],
)  # fmt: skip
def test_malformed_messages(conversation: object) -> None:
    with pytest.raises(PromptError):
        normalise_conversations(conversation)


def test_text_before_a_picture_is_warned_about_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_warned", set())
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert _render([{"role": "user", "content": parts}]).startswith("<|im_start|>User: What is this?<image>")
        _render([{"role": "user", "content": parts[::-1]}])
    assert [record.message for record in caplog.records if "text before its picture" in record.message] != []
    assert len(caplog.records) == 1
