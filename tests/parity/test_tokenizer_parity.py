"""The same ids, masks and texts as transformers' tokenizer on the same folder.

The peer is PreTrainedTokenizerFast, which runs tokenizer.json as it stands. Older folders name GPT2Tokenizer instead,
a class that transformers 5 builds anew without the splitter of single digits: its ids differ from those that the
checkpoint was trained on ("\\n\\n0"), so it is no reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer
from tests.tiny import CONTROL_TOKENS, PICTURE_TOKENS, build_tokenizer

WORDS = [*CONTROL_TOKENS, *PICTURE_TOKENS, "\n\n", " ", "cat", " 12", "<row_7_col_1>", "é", "日本", "\t", "<im", "age>"]
Pair = tuple[SmolVLMTokenizer, Any]


@pytest.fixture(scope="module", params=[4, 5], ids=["files-of-4", "files-of-5"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = build_tokenizer(tmp_path_factory.mktemp("tokenizer"), transformers_major=request.param)
    # transformers 4 would add token_type_ids by default; no model of the family takes them.
    theirs = PreTrainedTokenizerFast.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    return SmolVLMTokenizer.from_pretrained(folder), theirs


texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=12)), max_size=8).map("".join)


@given(rows=st.lists(texts, min_size=1, max_size=3), data=st.data())
def test_ids_masks_and_offsets(pair: Pair, rows: list[str], data: st.DataObject) -> None:
    ours, theirs = pair
    rows = [row.encode("utf-8", "replace").decode("utf-8") for row in rows]
    choices: dict[str, Any] = {
        "padding": data.draw(st.sampled_from([False, True, "longest", "max_length"])),
        "padding_side": data.draw(st.sampled_from([None, "left", "right"])),
        "pad_to_multiple_of": data.draw(st.sampled_from([None, 8])),
        "return_offsets_mapping": data.draw(st.booleans()),
        "return_special_tokens_mask": data.draw(st.booleans()),
        "return_token_type_ids": data.draw(st.sampled_from([None, True])),
        "add_special_tokens": data.draw(st.booleans()),
    }
    cut = data.draw(st.booleans())
    if cut or choices["padding"] == "max_length":
        choices["max_length"] = data.draw(st.sampled_from([8, 16]))
        choices["truncation"] = cut
    if cut and data.draw(st.booleans()):
        choices |= {"return_overflowing_tokens": True, "stride": data.draw(st.sampled_from([0, 3]))}
    expected, got = theirs(rows, **choices), ours(rows, **choices)
    assert dict(got) == dict(expected)


@given(text=texts)
def test_a_single_text_and_its_tokens(pair: Pair, text: str) -> None:
    ours, theirs = pair
    text = text.encode("utf-8", "replace").decode("utf-8")
    assert dict(ours(text)) == dict(theirs(text))
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert dict(ours(text, split_special_tokens=True)) == dict(theirs(text, split_special_tokens=True))


@given(ids=st.lists(st.integers(0, 461), max_size=20), skip=st.booleans())
def test_decoding(pair: Pair, ids: list[int], skip: bool) -> None:
    ours, theirs = pair
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=skip) == theirs.convert_ids_to_tokens(
        ids, skip_special_tokens=skip
    )
    rows = torch.tensor([ids, ids[::-1]])
    assert ours.batch_decode(rows, skip_special_tokens=skip) == theirs.batch_decode(rows, skip_special_tokens=skip)


def test_tensors_have_their_dtype(pair: Pair) -> None:
    ours, theirs = pair
    for kind, same in (("pt", torch.equal), ("np", np.array_equal)):
        expected = theirs(["a <image>", "b"], padding=True, return_tensors=kind)
        got = ours(["a <image>", "b"], padding=True, return_tensors=kind)
        for name in expected:
            assert got[name].dtype == expected[name].dtype and same(got[name], expected[name])


def test_special_tokens(pair: Pair) -> None:
    ours, theirs = pair
    for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert sorted(ours.all_special_tokens) == sorted(theirs.all_special_tokens)
    assert ours.special_tokens_map["eos_token"] == theirs.special_tokens_map["eos_token"]
    assert len(ours) == len(theirs) and ours.vocab_size == theirs.vocab_size
    assert (ours.padding_side, ours.truncation_side) == (theirs.padding_side, theirs.truncation_side)
    assert ours.model_max_length == theirs.model_max_length


def test_what_we_save_is_what_they_read(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = pair
    ours.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "<|im_start|>User:<image>Three cats, 12 dogs.\n\n"
    assert again(text).input_ids == theirs(text).input_ids == ours(text).input_ids
    assert sorted(again.all_special_tokens) == sorted(theirs.all_special_tokens)
    theirs.save_pretrained(tmp_path / "theirs")
    assert SmolVLMTokenizer.from_pretrained(tmp_path / "theirs").encode(text) == ours.encode(text)
