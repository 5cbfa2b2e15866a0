"""From what was said and what is right to a score and how sure it is.

``exact``: the share of answers that are right to the word, after blanks, letter case and a final full stop are evened
out. ``cer``: the character error rate, edits needed over characters wanted (0 is perfect; a talkative model can exceed
1). It keeps letter case.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["METRICS", "Mark", "Score", "edits", "mark", "normalise", "summarise"]

METRICS = ("exact", "cer")

SURE = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Mark:
    """One answer's share in the score: ``points`` of ``of`` (exact: 0 or 1 of 1; cer: edits of characters wanted)."""

    points: float
    of: float


@dataclass(frozen=True)
class Score:
    """Of ``n`` answers; ``low`` and ``high`` hold the true score with 95 % confidence, for questions like these."""

    value: float
    low: float
    high: float
    n: int


def normalise(text: str) -> str:
    """What ``exact`` compares: composed Unicode, single blanks, no letter case, no full stop at the end."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.rstrip(".").rstrip().casefold()


def edits(said: str, wanted: str) -> int:
    """The fewest characters to insert, delete or replace to turn one text into the other (Levenshtein, 1966)."""
    above = list(range(len(wanted) + 1))
    for row, character in enumerate(said, 1):
        line = [row]
        for column, other in enumerate(wanted, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (character != other)))
        above = line
    return above[-1]


def mark(metric: str, said: str, answers: Sequence[str]) -> Mark:
    """Mark one answer; of several that are right, the nearest counts. Raises ValueError for an unknown metric."""
    if metric == "exact":
        return Mark(float(normalise(said) in {normalise(answer) for answer in answers}), 1.0)
    if metric == "cer":
        said = " ".join(unicodedata.normalize("NFC", said).split())
        texts = [" ".join(unicodedata.normalize("NFC", answer).split()) for answer in answers]
        return min((Mark(edits(said, text), max(1, len(text))) for text in texts), key=lambda m: m.points / m.of)
    raise ValueError(f"metric {metric!r}; {' and '.join(METRICS)} are known")


def summarise(metric: str, marks: Sequence[Mark]) -> Score:
    """Points over what there was to get, over all answers; the interval is Wilson's for shares, else resampled."""
    if not marks:
        raise ValueError("no answers to summarise")
    points, of = (np.array([getattr(one, name) for one in marks]) for name in ("points", "of"))
    value = float(points.sum() / of.sum())
    low, high = _wilson(float(points.sum()), len(marks)) if metric == "exact" else _resampled(points, of)
    return Score(value, low, high, len(marks))


def _wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927): it stays inside 0…1, and says something where all answers are right."""
    share, spread = right / n, SURE**2 / n
    middle = share + spread / 2
    half = SURE * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def _resampled(points: np.ndarray, of: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap over the questions, always with the same draws."""
    picks = np.random.default_rng(0).integers(0, len(points), (RESAMPLES, len(points)))
    low, high = np.quantile(points[picks].sum(1) / of[picks].sum(1), (0.025, 0.975))
    return float(low), float(high)
