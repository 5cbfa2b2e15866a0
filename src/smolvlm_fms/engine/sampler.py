"""Choosing tokens from logits, each row by its own options and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.engine.sequence import Sampled, Sequence

__all__ = ["choose", "filtered_probabilities", "reshape_logits", "sample", "uniform"]


def sample(
    logits_BV: Tensor,
    sequences: SequenceOf[Sequence],
    banned: SequenceOf[int] = (),
    likeliest: list[int] | None = None,
) -> list[Sampled]:
    """Choose one token a row of ``logits_BV`` (B, V), any float dtype. ``banned`` ids are never chosen. ``likeliest``:
    each row's, if they are known."""
    if banned:
        logits_BV = logits_BV.index_fill(1, torch.tensor(list(banned), device=logits_BV.device), float("-inf"))
    plain = [s for s in sequences if s.options.greedy and not s.options.reshapes and s.options.logprobs is None]
    if len(plain) == len(sequences):
        return [Sampled(token) for token in likeliest or _likeliest(logits_BV)]
    return [choose(logits_V, sequence) for logits_V, sequence in zip(logits_BV, sequences, strict=True)]


def _likeliest(logits_BV: Tensor) -> list[int]:
    """The likeliest token of each row. On the CPU by numpy, whose argmax uses vectors: torch's takes ten times as long,
    a hundredth of a decode step."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        best: list[int] = logits_BV.numpy().argmax(-1).tolist()
        return best
    return [int(token) for token in logits_BV.argmax(-1).tolist()]


def choose(logits_V: Tensor, sequence: Sequence) -> Sampled:
    """Choose the next token of one sequence from its logits (V,)."""
    options = sequence.options
    raw_V = logits_V.float()
    shaped_V = reshape_logits(raw_V, sequence.prompt, sequence.output, options) if options.reshapes else raw_V
    if options.greedy:
        token = int(shaped_V.argmax())
    else:
        probabilities, ids = filtered_probabilities(shaped_V, options)
        cumulated = probabilities.cumsum(0)
        place = torch.searchsorted(cumulated, uniform(sequence.seed, len(sequence.output)) * float(cumulated[-1]))
        token = int(ids[min(int(place), len(ids) - 1)])
    if options.logprobs is None:
        return Sampled(token)
    logprobs_V = raw_V.log_softmax(-1)
    values, best = logprobs_V.topk(min(options.logprobs, len(logprobs_V)))
    top = tuple(zip(best.tolist(), values.tolist(), strict=True))
    return Sampled(token, float(logprobs_V[token]), top)


def reshape_logits(
    logits_V: Tensor, prompt: SequenceOf[int], output: SequenceOf[int], options: GenerationOptions
) -> Tensor:
    """Apply penalties and biases to logits (V,), fp32; the input stays as it is.

    The repetition penalty divides positive and multiplies negative logits of every token seen (CTRL, arXiv 1909.05858).
    Presence and frequency penalties are subtracted once and once per occurrence in the answer.
    """
    logits_V = logits_V.clone()
    if options.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *output}), device=logits_V.device)
        values = logits_V[seen]
        factor = options.repetition_penalty
        logits_V[seen] = torch.where(values < 0, values * factor, values / factor)
    if output and (options.presence_penalty or options.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(list(output), device=logits_V.device), return_counts=True)
        logits_V[ids] -= options.presence_penalty + options.frequency_penalty * counts
    for token, bias in options.logit_bias.items():
        if token < len(logits_V):
            logits_V[token] += bias
    return logits_V


def filtered_probabilities(logits_V: Tensor, options: GenerationOptions) -> tuple[Tensor, Tensor]:
    """Return probabilities (K,), fp32, of the tokens that may be chosen, likeliest first, and their ids (K,).

    Temperature, then top-k, top-p and min-p, each on what the one before left, as transformers does. The probabilities
    sum to one. Equal logits keep the order of their ids, so that the same seed chooses the same token everywhere.
    """
    scaled_V = logits_V / options.temperature
    values, ids = _largest(scaled_V, options)
    if options.top_k:
        values, ids = values[: options.top_k], ids[: options.top_k]
    probabilities = (
        values.softmax(0) if options.top_k else (values - scaled_V.logsumexp(0)).exp()
    )  # top-p looks at what top-k left, renormalised
    if options.top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities
        keep = before < options.top_p
        keep[0] = True
        values, ids, probabilities = values[keep], ids[keep], probabilities[keep]
    if options.min_p:
        keep = probabilities >= options.min_p * probabilities[0]
        values, ids = values[keep], ids[keep]
    return values.softmax(0), ids


def _largest(scaled_V: Tensor, options: GenerationOptions) -> tuple[Tensor, Tensor]:
    """Logits in falling order with their ids: all, or as many as the filters can leave.

    Sorting a whole vocabulary costs milliseconds; the top-p nucleus is nearly always among the first thousand.
    """
    size = len(scaled_V)
    count = min(options.top_k or size, size)
    if not options.top_k and (options.top_p < 1.0 or options.min_p):
        count = min(1024, size)
        values, _ = scaled_V.topk(count)
        share = float((values - scaled_V.logsumexp(0)).exp().sum())
        tail_too_small = options.min_p > 0 and float((values[-1] - values[0]).exp()) < options.min_p
        if not (tail_too_small or (options.top_p < 1.0 and share > options.top_p)):
            count = size
    if count == size:
        values, ids = scaled_V.sort(descending=True, stable=True)
        return values, ids
    values, ids = scaled_V.topk(count)
    order = torch.argsort(ids)  # topk breaks ties as it likes
    again = torch.argsort(values[order], descending=True, stable=True)
    return values[order][again], ids[order][again]


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing but ``seed`` and ``step`` (Philox counters, no state)."""
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, step])
    return float(np.random.Generator(bits).random())
