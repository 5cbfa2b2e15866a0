"""The full shape of SmolVLM-256M with SmolLM2's real text weights: the same text as transformers', and a sensible one.

Tower and connector are random (no hub is needed), so pictures carry no meaning; both implementations must make the same
of them all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fms.utils.generation import generate
from tokenizers import Tokenizer
from torch import Tensor

from smolvlm_fms.config_presets import PRESETS
from smolvlm_fms.fms_bridge.gguf import GGUFText
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.model.smolvlm import SmolVLM
from tests.smollm2 import smollm2_gguf
from tests.tiny_models import load_peer

pytestmark = pytest.mark.slow

TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"
SYSTEM = TURN.format(role="system", text="You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 + 3?"]


class Setup(NamedTuple):
    """The checkpoint in both implementations, fp32, and its tokenizer."""

    ours: Any
    theirs: Any
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    source = GGUFText(smollm2_gguf())
    folder = tmp_path_factory.mktemp("full-256m")
    write_checkpoint(folder, source)
    with torch.no_grad():
        yield Setup(
            load_model(folder, dtype=torch.float32), load_peer(folder), Tokenizer.from_str(source.tokenizer_json())
        )


def write_checkpoint(folder: Path, source: GGUFText) -> None:
    """A bf16 checkpoint of the 256M's shape. The 128 picture tokens have zero rows, so none is ever generated."""
    torch.manual_seed(0)
    model = SmolVLM(PRESETS["256m_instruct"])
    model.vision_tower.reset_parameters()
    model.connector.reset_parameters()
    with torch.no_grad():
        for weight in (model.text_model.base_model.embedding.weight, model.text_model.head.weight):
            weight.zero_()
    source.load_into(model)
    save_pretrained(model, folder, dtype=torch.bfloat16)


def encode(tokenizer: Tokenizer, question: str, placeholders: int = 0) -> list[int]:
    before, after = TURN.format(role="user", text="\0" + question).split("\0")
    parts = tokenizer.encode(SYSTEM + before).ids, tokenizer.encode(after + "<|im_start|>assistant\n").ids
    return parts[0] + [49190] * placeholders + parts[1]


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[2] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def ours_and_theirs(setup: Setup, rows: list[list[int]], tokens: int, **pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy continuations of a left-padded batch; FMS's own generate runs ours."""
    ids, mask = left_padded(rows)
    theirs = setup.theirs.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=2,
        **pictures,
    )  # fmt: skip
    ours = generate(
        setup.ours, ids, max_new_tokens=tokens, do_sample=False, use_cache=True,
        prepare_model_inputs_hook=setup.ours.prepare_inputs, extra_kwargs={"attention_mask": mask, **pictures},
    )  # fmt: skip
    return ours[:, ids.shape[1] :], theirs[:, ids.shape[1] :]


def test_the_configuration_is_the_256ms() -> None:
    text = GGUFText(smollm2_gguf()).config
    preset = PRESETS["256m_instruct"].text
    assert text == preset.updated(vocab_size=49152)


def test_text_is_identical_and_sensible(setup: Setup) -> None:
    rows = [encode(setup.tokenizer, question) for question in QUESTIONS]
    ours, theirs = ours_and_theirs(setup, rows, 16)
    assert ours.tolist() == theirs.tolist()
    answer = setup.tokenizer.decode(ours[0].tolist()).splitlines()[0]
    assert answer.startswith("The capital of France is Paris.")


def test_text_with_pictures_is_identical(setup: Setup) -> None:
    """One row with two tiles, one with one, one without: what a random tower sees reaches the text alike."""
    pixels = torch.rand(3, 2, 3, 512, 512, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.ones(3, 2, 512, 512, dtype=torch.long)
    mask[1, 1] = mask[2] = 0
    pixels = pixels * mask[:, :, None]
    rows = [encode(setup.tokenizer, q, 64 * n) for q, n in zip(QUESTIONS, (2, 1, 0), strict=True)]
    ours, theirs = ours_and_theirs(setup, rows, 8, pixel_values=pixels, pixel_attention_mask=mask)
    assert ours.tolist() == theirs.tolist()
    alone, _ = ours_and_theirs(setup, rows[2:], 8)
    assert ours[2:].tolist() == alone.tolist()


def test_features_and_logits_agree(setup: Setup) -> None:
    pixels = torch.rand(1, 1, 3, 512, 512, generator=torch.Generator().manual_seed(2)) * 2 - 1
    features = setup.ours.encode_images(pixels).features
    theirs = setup.theirs.model.connector(
        setup.theirs.model.vision_model(pixels[0], patch_attention_mask=torch.ones(1, 32, 32, dtype=torch.bool))[0]
    )
    assert float((features - theirs).abs().max()) <= 1e-4
    ids = torch.tensor([encode(setup.tokenizer, QUESTIONS[0], 64)])
    difference = setup.ours(ids, pixel_values=pixels) - setup.theirs(input_ids=ids, pixel_values=pixels).logits
    assert float(difference.abs().max()) <= 1e-4  # of logits up to 30; measured: 0
