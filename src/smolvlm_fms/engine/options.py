"""What a caller may ask of one generation. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from smolvlm_fms.errors import InputError

__all__ = ["GenerationOptions"]

COLDEST = 1e-5


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when to stop.

    max_tokens: at most so many tokens are generated (fewer where the context ends earlier).
    temperature: 0 is greedy, and so is less than 1e-5, by which logits in fp32 cannot be divided. top_k (0: off), top_p
        (1: off) and min_p (0: off) thin out the choice, in this order, after the temperature, as transformers does.
    repetition_penalty: as in transformers (CTRL), over prompt and answer. presence_penalty, frequency_penalty: as in
        OpenAI's API, over the answer.
    seed: the same seed gives the same answer, whatever else runs in the batch. None draws one.
    logit_bias: token id to a number added to its logit.
    logprobs: None, or how many alternatives to report beside each token (0: the token's own only); of the model's own
        distribution, before penalties and temperature.
    stop: strings that end the answer and are not part of it. stop_token_ids: ends beside the checkpoint's own.
    ignore_eos: go on at the checkpoint's ends (for measurements).
    loop_detection: end with ``"loop"`` where the tail repeats itself again and again.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    loop_detection: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in dict(self.logit_bias).items()})
        _whole("max_tokens", self.max_tokens, 1)
        _whole("top_k", self.top_k, 0)
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _between("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _between("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        if self.top_p == 0.0:
            raise InputError("top_p is 0, which leaves no token to choose; use temperature=0 for the likeliest one.")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, 100)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        for token, value in self.logit_bias.items():
            if token < 0 or math.isnan(value) or value == math.inf:
                raise InputError(
                    f"logit_bias has {token}: {value}; token ids are not negative, biases are numbers (-inf forbids "
                    "a token, 1000 is as good as inf)."
                )
        if any(not isinstance(token, int) or token < 0 for token in self.stop_token_ids):
            raise InputError(f"stop_token_ids are token ids (whole numbers); {self.stop_token_ids!r} came.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < COLDEST

    @property
    def reshapes(self) -> bool:
        """Whether logits are changed before the choice."""
        return bool(
            self.logit_bias or self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """A changed copy; values that are None keep what there is, unknown names raise InputError."""
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"Unknown option {', '.join(unknown)}. The options: {', '.join(sorted(known))}.")
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})


def _strings(value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if any(not isinstance(one, str) or not one for one in values):
        raise InputError(f"stop is a string or a list of strings, none of them empty; {value!r} came.")
    return values


def _whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise InputError(f"{name} must be a whole number from {low}{'' if high is None else f' to {high}'}; {value!r}.")


def _between(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name} must be a number from {low} to {high}; it is {value!r}.")
