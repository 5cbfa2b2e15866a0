"""Outcomes as a table for people and as one object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smolvlm_fms.evaluation.run import Outcome
from smolvlm_fms.evaluation.scoring import Score

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["as_object", "as_table"]

DIGITS = 4


def as_object(model: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """``model``; ``skills`` {name: {metric, score, blank, n}}; ``details`` {name: {interval, kinds} or {error}}.

    Scores are shares (0…1) to four digits, ``blank`` is None where no grey pictures were shown, and both are None, with
    n = 0, for a test that the checkpoint could not take.
    """
    skills, details = {}, {}
    for outcome in outcomes:
        skills[outcome.name] = {"metric": outcome.metric, **_row(outcome.score, outcome.blank)}
        details[outcome.name] = _details(outcome)
    return {"model": model, "skills": skills, "details": details}


def _row(score: Score | None, blank: Score | None) -> dict[str, Any]:
    return {"score": _rounded(score), "blank": _rounded(blank), "n": score.n if score else 0}


def _rounded(score: Score | None) -> float | None:
    return None if score is None else round(score.value, DIGITS)


def _details(outcome: Outcome) -> dict[str, Any]:
    if outcome.score is None:
        return {"error": outcome.error}
    found: dict[str, Any] = {"interval": [round(outcome.score.low, DIGITS), round(outcome.score.high, DIGITS)]}
    if outcome.kinds:
        found["kinds"] = {kind: _row(*scores) for kind, scores in outcome.kinds.items()}
    return found


def as_table(model: str, outcomes: Sequence[Outcome]) -> Table:
    """A rich table; the kinds of a test's questions stand under it."""
    from rich.table import Table

    table = Table(title=f"Held-out tests: {model}", title_justify="left")
    for name, justify in (
        ("test", "left"), ("metric", "left"), ("score", "right"), ("95 %", "right"), ("blank picture", "right"),
        ("n", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "test")  # type: ignore[arg-type]
    for outcome in outcomes:
        if outcome.score is None:
            table.add_row(outcome.name, outcome.metric, "–", "", "", "0")
            continue
        low, high = _percent(outcome.score.low), _percent(outcome.score.high)
        table.add_row(
            outcome.name, outcome.metric, f"[bold]{_percent(outcome.score.value)}[/]", f"{low} – {high}",
            _percent(outcome.blank.value) if outcome.blank else "–", str(outcome.score.n),
        )  # fmt: skip
        for kind, (score, blank) in (outcome.kinds or {}).items():
            shown = [f"  {kind}", "", _percent(score.value), "", _percent(blank.value) if blank else "–", str(score.n)]
            table.add_row(*shown, style="dim")
    return table


def _percent(share: float) -> str:
    return f"{share:.1%}"
