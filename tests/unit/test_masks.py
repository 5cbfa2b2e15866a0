"""Positions and masks of the text backbone, and what they do to its results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smolvlm_fms.config import TextConfig
from smolvlm_fms.errors import InputError
from smolvlm_fms.model.decode import decode
from smolvlm_fms.model.masks import attention_arguments, grown_mask, text_positions
from smolvlm_fms.modules.text import TextModel

LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def text() -> TextModel:
    torch.manual_seed(0)
    config = TextConfig(
        vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = TextModel(config).eval()
    model.reset_parameters()
    return model


def run(model: TextModel, inputs: Tensor, **arguments: Any) -> Any:
    with torch.no_grad():
        return decode(model, inputs, **arguments)


def test_padding_does_not_count() -> None:
    assert text_positions(LEFT, 2, 5, 0, "cpu").tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert text_positions(LEFT, 2, 2, 3, "cpu").tolist() == [[3, 4], [1, 2]]
    assert text_positions(None, 2, 2, 3, "cpu").tolist() == [[3, 4], [3, 4]]


def test_no_mask_where_causal_attention_says_the_same() -> None:
    full = torch.ones(2, 5, dtype=torch.long)
    assert attention_arguments(full, 5, 0, "cpu") == attention_arguments(None, 5, 0, "cpu") == {"is_causal_mask": True}
    assert attention_arguments(None, 1, 4, "cpu") == {"is_causal_mask": False}
    mask = attention_arguments(LEFT, 5, 0, "cpu")["mask"]
    assert mask[1].tolist()[4] == [False, False, True, True, True]
    assert mask.any(-1).all()  # no row of the softmax is empty


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (5,), (2, 5, 5)])
def test_masks_of_another_length_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="3 cached and 2 new"):
        attention_arguments(torch.ones(shape), 2, 3, "cpu")


def test_grown_mask() -> None:
    assert grown_mask(None, 9) is None
    grown = grown_mask(LEFT, 7)
    assert grown is not None and grown[1].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert grown_mask(LEFT, 5) is LEFT


def test_left_padding_changes_nothing(text: TextModel) -> None:
    row = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[9, 8, 7, 6, 5], [0, 0, 5, 6, 7]])
    alone, batch = run(text, row), run(text, padded, attention_mask=LEFT)
    torch.testing.assert_close(batch[1, 2:], alone[0])
    assert batch.isfinite().all()


@pytest.mark.parametrize("mask", [None, LEFT])
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_cache_changes_nothing(text: TextModel, mask: Tensor | None, chunk: int) -> None:
    ids = torch.randint(3, 30, (2, 9))
    total = None if mask is None else grown_mask(mask, 9)
    whole = run(text, ids, attention_mask=total)
    logits, cache = run(text, ids[:, :5], attention_mask=mask, use_cache=True)
    torch.testing.assert_close(logits, whole[:, :5])
    for start in range(5, 9, chunk):
        end = start + chunk
        seen = None if total is None else total[:, :end]
        logits, cache = run(text, ids[:, start:end], attention_mask=seen, past_key_value_states=cache, use_cache=True)
        torch.testing.assert_close(logits, whole[:, start:end])


def test_as_many_tokens_as_heads(text: TextModel) -> None:
    """FMS's own attention takes (B, T, H, D) for (B, H, T, D) when T = H."""
    ids = torch.randint(3, 30, (1, 6))
    whole = run(text, ids)
    for length in range(1, 7):
        logits, _ = run(text, ids[:, :length], use_cache=True)
        torch.testing.assert_close(logits, whole[:, :length])


def test_texts_longer_than_the_configuration_says(text: TextModel) -> None:
    ids = torch.randint(3, 30, (1, 50))
    whole = run(text, ids)
    assert whole.isfinite().all()
    _, cache = run(text, ids[:, :10], use_cache=True)
    rest, _ = run(text, ids[:, 10:], past_key_value_states=cache, use_cache=True)
    torch.testing.assert_close(rest, whole[:, 10:])


def test_which_logits_and_states_come(text: TextModel) -> None:
    ids = torch.randint(3, 30, (2, 5))
    whole = run(text, ids)
    torch.testing.assert_close(run(text, ids, last_n_tokens=2), whole[:, -2:])
    wanted = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(run(text, ids, logits_mask=wanted), whole[wanted])
    logits, cache, states = run(text, ids, use_cache=True, output_hidden_states=True)
    assert len(states) == 3 and len(cache) == 2
    torch.testing.assert_close(text.logits(states[-1]), logits)
    torch.testing.assert_close(run(text, text.base_model.embed(ids)), whole)


def test_the_text_model_is_one_graph(text: TextModel) -> None:
    embeddings, positions = torch.randn(2, 5, 24), torch.arange(5).expand(2, 5)
    mask = attention_arguments(LEFT, 5, 0, "cpu")["mask"]

    def forward(x: Tensor) -> Tensor:
        hidden: Tensor = text.base_model(x, position_ids=positions, mask=mask, is_causal_mask=False)[0]
        return text.logits(hidden)

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(embeddings), forward(embeddings))


def test_gradient_checkpointing_changes_no_gradient(text: TextModel) -> None:
    text.train()
    gradients = []
    for checkpointing in (False, True):
        text.base_model.gradient_checkpointing = checkpointing
        text.zero_grad()
        decode(text, torch.arange(3, 9)[None]).square().sum().backward()
        gradients.append(text.base_model.embedding.weight.grad.clone())
    text.base_model.gradient_checkpointing = False
    text.eval()
    assert torch.equal(*gradients)
