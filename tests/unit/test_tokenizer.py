"""The tokenizer on its own: padding, truncation, round trips, its files and its errors."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolvlm_fms.errors import ConfigurationError, FetchError, InputError
from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer
from tests.tiny import build_tokenizer, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> SmolVLMTokenizer:
    return SmolVLMTokenizer.from_pretrained(folder)


@given(text=st.text(max_size=80))
def test_text_comes_back(tokenizer: SmolVLMTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", "replace").decode("utf-8")


def test_special_tokens_are_attributes(tokenizer: SmolVLMTokenizer, folder: Path) -> None:
    ids = token_ids(folder)
    assert tokenizer.pad_token == "<|im_end|>" and tokenizer.pad_token_id == ids["<|im_end|>"]
    assert tokenizer.image_token_id == ids["<image>"] == tokenizer.convert_tokens_to_ids("<image>")
    assert tokenizer.sep_token is None and tokenizer.sep_token_id is None
    assert len(tokenizer) == tokenizer.vocab_size + len(ids) - 17  # SmolLM2's own control tokens are in the base
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tokenizer.no_such_thing
    assert tokenizer.convert_tokens_to_ids(["<image>", "never seen"]) == [ids["<image>"], ids["<|endoftext|>"]]
    assert tokenizer.convert_ids_to_tokens([ids["<image>"], 10**6]) == ["<image>", None]
    assert tokenizer.convert_ids_to_tokens([ids["<image>"], 30], skip_special_tokens=True) == [
        tokenizer.convert_ids_to_tokens(30)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(tokenizer: SmolVLMTokenizer, side: str) -> None:
    batch = tokenizer(["a", "a b c"], padding=True, padding_side=side, return_tensors="pt")
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    mask = batch.attention_mask[0].tolist()
    assert mask == sorted(mask, reverse=side == "right") and sum(mask) == 1
    assert (batch.input_ids[0][batch.attention_mask[0] == 0] == tokenizer.pad_token_id).all()
    wide = tokenizer(["a", "a b c"], padding="longest", pad_to_multiple_of=8, return_tensors="np")
    assert wide["input_ids"].shape == (2, 8) and isinstance(wide["input_ids"], np.ndarray)
    assert len(tokenizer("a", padding="max_length", max_length=5)["input_ids"]) == 5


def test_truncation_stands_on_the_configured_side(tokenizer: SmolVLMTokenizer) -> None:
    whole = tokenizer.encode("one two three four five")
    assert tokenizer.truncation_side == "left"
    assert tokenizer("one two three four five", truncation=True, max_length=3)["input_ids"] == whole[-3:]
    assert tokenizer("one two three four five", max_length=3)["input_ids"] == whole[-3:]


def test_skipping_special_tokens(tokenizer: SmolVLMTokenizer) -> None:
    ids = tokenizer(["<|im_start|>User:<image>hi<end_of_utterance>", "hi"])["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ["User:hi", "hi"]
    assert tokenizer.batch_decode(ids)[0] == "<|im_start|>User:<image>hi<end_of_utterance>"
    assert tokenizer.decode(torch.tensor(ids[1])) == "hi" == tokenizer.decode(np.array(ids[1]))
    assert tokenizer.decode(ids[1][0]) in "hi"


def test_special_tokens_can_be_read_as_text(tokenizer: SmolVLMTokenizer) -> None:
    as_text = tokenizer("<image>", split_special_tokens=True)["input_ids"]
    assert tokenizer.image_token_id not in as_text and tokenizer.decode(as_text) == "<image>"
    assert tokenizer("<image>")["input_ids"] == [tokenizer.image_token_id]


def test_a_blank_before_a_full_stop_is_the_texts_own(tokenizer: SmolVLMTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a . b"), clean_up_tokenization_spaces=True) == "a . b"


@pytest.mark.parametrize("major", [4, 5])
def test_both_layouts_and_the_saved_one_agree(tmp_path: Path, major: int) -> None:
    first = SmolVLMTokenizer.from_pretrained(build_tokenizer(tmp_path / "a", transformers_major=major))
    first.save_pretrained(tmp_path / "b")
    second = SmolVLMTokenizer.from_pretrained(tmp_path / "b")
    text = "<|im_start|>User:<image>How many cats? 12.\n\n"
    assert first.encode(text) == second.encode(text)
    assert first.special_tokens_map == second.special_tokens_map
    assert sorted(first.all_special_ids) == sorted(second.all_special_ids)
    assert (first.padding_side, first.truncation_side) == (second.padding_side, second.truncation_side)
    assert first.model_max_length == second.model_max_length == 8192


def test_settings_baked_into_tokenizer_json(tmp_path: Path) -> None:
    folder = build_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = SmolVLMTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    assert len(tokenizer.encode("one two three four five")) > 3  # a prompt is never cut without being asked


def test_missing_special_tokens_are_added(tmp_path: Path) -> None:
    folder = build_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"]["stop_token"] = "<stop>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = SmolVLMTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a<stop>")[-1] == tokenizer.stop_token_id == len(tokenizer) - 1
    assert tokenizer.decode(tokenizer.encode("a<stop>"), skip_special_tokens=True) == "a"
    assert tokenizer.add_special_tokens(["<image>", "<new>"]) == 1
    assert len(tokenizer.encode("<new>")) == 1 and tokenizer.convert_tokens_to_ids("<new>") in tokenizer.all_special_ids


def test_it_survives_pickling_and_threads(tokenizer: SmolVLMTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("hello <image>") == tokenizer.encode("hello <image>")
    expected = {length: tokenizer(["a", "a b c"], padding="max_length", max_length=length)["input_ids"]
                for length in range(4, 12)}  # fmt: skip
    wrong: list[int] = []

    def work(length: int) -> None:
        for _ in range(50):
            got = tokenizer(["a", "a b c"], padding="max_length", max_length=length)["input_ids"]
            wrong.extend([length] * (got != expected[length]))

    threads = [threading.Thread(target=work, args=(length,)) for length in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": [["a"]]}, "must be a string"),
        ({"text": None}, "must be a string"),
        ({"text": []}, "empty"),
        ({"text": ["a"], "text_pair": "b"}, "text_pair must match"),
        ({"text": "a", "padding": "widest"}, "padding must be"),
        ({"text": "a", "truncation": "maybe"}, "truncation must be"),
        ({"text": ["a", "a b c"], "return_tensors": "pt"}, "padding=True"),
        ({"text": ["a"], "return_tensors": "tf"}, "'pt', 'np' or None"),
        ({"text": "a", "padding": True, "padding_side": "up"}, "'left' or 'right'"),
        ({"text": "a", "truncation": True, "max_length": 4, "stride": 4}, "stride 4"),
        ({"text": "a", "padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 4}, "no multiple"),
    ],
)
def test_what_cannot_be_done_says_so(tokenizer: SmolVLMTokenizer, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer(**arguments)


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"no tokenizer\.json"):
        SmolVLMTokenizer.from_pretrained(tmp_path)
    build_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        SmolVLMTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="not a tokenizer"):
        SmolVLMTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_without_padding_says_so(tmp_path: Path) -> None:
    folder = build_tokenizer(tmp_path)
    (folder / "special_tokens_map.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = SmolVLMTokenizer.from_pretrained(folder)
    with pytest.raises(InputError, match="no padding token"):
        tokenizer("a", padding=True)
    tokenizer.pad_token = "<|im_end|>"
    assert tokenizer("a", padding="max_length", max_length=3)["input_ids"][1:] == [2, 2]
