"""Sampling against plain definitions, and its promises: seeds, row independence, ties."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.engine.sampler import filtered_probabilities, reshape_logits, sample, uniform
from smolvlm_fms.engine.sequence import Sequence, content_symbols
from smolvlm_fms.errors import InputError


def sequence(prompt: list[int], output: list[int], seed: int = 0, **options: Any) -> Sequence:
    return Sequence(
        id=0,
        prompt=prompt,
        options=GenerationOptions(**options),
        pictures=[],
        stop_tokens=frozenset(),
        seed=seed,
        symbols=content_symbols(prompt, []),
        sink=lambda event: None,
        output=output,
    )


def kept_by_definition(logits: list[float], options: GenerationOptions) -> dict[int, float]:
    """Temperature, top-k, top-p, min-p, in plain Python."""
    weights = {i: math.exp((x - max(logits)) / options.temperature) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))
    if options.top_k:
        ranked = ranked[: options.top_k]
    total = sum(weights[i] for i in ranked)
    nucleus, mass = [], 0.0
    for i in ranked:
        if options.top_p < 1.0 and nucleus and mass >= options.top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    nucleus = [i for i in nucleus if weights[i] >= options.min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in nucleus)
    return {i: weights[i] / total for i in nucleus}


@given(
    st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=40, unique=True),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 100]),
    st.sampled_from([0.2, 0.6, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_filters_agree_with_their_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities, ids = filtered_probabilities(torch.tensor(logits), options)
    found = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    expected = kept_by_definition(logits, options)
    # A token exactly on the nucleus' edge may fall either way in floating point.
    assert abs(len(found) - len(expected)) <= 1
    if found.keys() == expected.keys():
        assert found == pytest.approx(expected, abs=1e-4)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.999, "min_p": 1e-5}, {"top_k": 3000}])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_short_cut_for_large_vocabularies_changes_nothing(options: dict[str, Any], spread: float) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * spread
    chosen = GenerationOptions(temperature=1.0, **options)
    probabilities, ids = filtered_probabilities(logits, chosen)
    expected = kept_by_definition(logits.tolist(), chosen)
    assert abs(len(ids) - len(expected)) <= 2
    assert ids.tolist()[: len(expected) - 2] == [*expected][: len(ids) - 2] or len(expected) <= 2
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-4)


def test_penalties_and_biases() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 3.0])
    ctrl = GenerationOptions(repetition_penalty=2.0)
    assert reshape_logits(logits, [0], [1], ctrl).tolist() == [1.0, -4.0, 1.0, 0.5, 3.0]
    openai = GenerationOptions(presence_penalty=1.0, frequency_penalty=0.5)
    assert reshape_logits(logits, [0, 4], [2, 3, 2], openai).tolist() == [2.0, -2.0, -1.0, -1.0, 3.0]
    biased = GenerationOptions(logit_bias={4: -100.0, 1: 5.0, 99: 1.0})
    assert reshape_logits(logits, [], [], biased).tolist() == [2.0, 3.0, 1.0, 0.5, -97.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5, 3.0]


def test_greedy_takes_the_first_of_equals_and_never_a_banned_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 1.0]])
    rows = [sequence([0], []), sequence([0], [])]
    assert [one.token for one in sample(logits, rows)] == [1, 2]
    assert [one.token for one in sample(logits, rows, banned=[1])] == [2, 2]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    counts: Counter[int] = Counter()
    for seed in range(2000):
        counts[sample(logits, [sequence([0], [], seed, temperature=1.0)])[0].token] += 1
    for token, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert counts[token] / 2000 == pytest.approx(share, abs=0.04)


def test_the_coldest_and_forbidden_tokens_leave_a_choice() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    for temperature in (1e-5, 1e-30, 1e-45, 5e-324):
        assert sample(logits, [sequence([0], [], temperature=temperature)])[0].token == 1
    drawn = {
        sample(logits, [sequence([0], [], seed, temperature=2.0, logit_bias={1: -math.inf})])[0].token
        for seed in range(60)
    }
    assert drawn == {0, 2, 3}
    with pytest.raises(InputError, match="-inf forbids"):
        GenerationOptions(logit_bias={0: math.inf})


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [sequence([0], [1] * row, seed=7, temperature=1.0) for row in range(3)]
    together = [one.token for one in sample(logits, rows)]
    alone = [sample(logits[row : row + 1], rows[row : row + 1])[0].token for row in range(3)]
    assert together == alone
    mixed = [sequence([0], []), rows[1], sequence([0], [], logprobs=2)]
    assert sample(logits, mixed)[1].token == alone[1]
    assert len({uniform(7, step) for step in range(100)} | {uniform(8, step) for step in range(100)}) == 200
    assert all(0 <= uniform(2**64 - 1, step) < 1 for step in range(50))


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    row = sequence([3], [3], temperature=0.5, top_k=1, repetition_penalty=9.0, logprobs=2, seed=1)
    one = sample(logits, [row])[0]
    expected = logits[0].log_softmax(0)
    assert one.token == 2
    assert one.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in one.top] == [3, 2]
    assert one.top[0][1] == pytest.approx(float(expected[3]))


def test_bf16_logits_are_taken() -> None:
    logits = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for options in ({}, {"temperature": 0.7, "top_p": 0.9}, {"logit_bias": {3: 50.0}}):
        tokens = [one.token for one in sample(logits, [sequence([1], [], **options), sequence([1], [2], **options)])]
        assert all(0 <= token < 2000 for token in tokens)
    assert tokens == [3, 3]
