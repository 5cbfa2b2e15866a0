"""Ask a checkpoint every question of a test, with its picture and with a grey one, and mark what it says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_fms.errors import SmolVLMError
from smolvlm_fms.evaluation.journal import Journal
from smolvlm_fms.evaluation.pictures import filled
from smolvlm_fms.evaluation.scoring import Mark, Score, mark, summarise
from smolvlm_fms.evaluation.suite import Suite

if TYPE_CHECKING:
    from smolvlm_fms.engine.api import VLM

__all__ = ["Outcome", "evaluate"]


@dataclass(frozen=True)
class Outcome:
    """A test's result. ``kinds``: (with the picture, with a grey one) for each sort of question, where there are
    several. ``error`` says why the checkpoint could not be tested; the scores are then None."""

    name: str
    metric: str
    score: Score | None = None
    blank: Score | None = None
    kinds: dict[str, tuple[Score, Score | None]] | None = None
    error: str = ""


class _BrokenItem(Exception):
    """The test itself cannot be read, whatever the checkpoint."""

    def __init__(self, error: SmolVLMError) -> None:
        super().__init__(str(error))
        self.error = error


def evaluate(
    vlm: VLM,
    suites: Iterable[Suite],
    *,
    blank: bool = True,
    journal: Journal | None = None,
    advance: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Run tests and yield each one's outcome as soon as it is there.

    blank: also ask with grey pictures. journal: answers that it holds are not asked for again, new ones are added to
    it. advance: called after every answer. options: of the generation (``detail`` …); the likeliest token is taken each
    time, so that the same checkpoint gives the same scores.

    A checkpoint that cannot take a test (no videos, too small a context) gives an outcome with an ``error``. A test
    that cannot be read raises InputError, ImageError, VideoError or FetchError.
    """
    journal = journal or Journal()
    for suite in suites:
        try:
            marks = [_marks(vlm, suite, grey, journal, advance, options) for grey in (False, True)[: 1 + blank]]
        except _BrokenItem as broken:
            raise broken.error from broken
        except SmolVLMError as error:
            yield Outcome(suite.name, suite.metric, error=str(error))
            continue
        grey_marks = marks[1] if blank else None
        yield Outcome(
            suite.name,
            suite.metric,
            summarise(suite.metric, marks[0]),
            summarise(suite.metric, grey_marks) if grey_marks else None,
            _by_kind(suite, marks[0], grey_marks),
        )


def _marks(
    vlm: VLM, suite: Suite, blank: bool, journal: Journal, advance: Callable[[], None], options: dict[str, Any]
) -> list[Mark]:
    """A mark for every question, in their order."""
    said = {number: journal.answer(suite, number, blank) for number in range(len(suite.items))}
    missing = [number for number, text in said.items() if text is None]
    for _ in range(len(said) - len(missing)):
        advance()

    def requests() -> Iterator[list[dict[str, Any]]]:
        for number in missing:
            try:
                yield filled(suite, suite.items[number], vlm.processor, blank=blank)
            except SmolVLMError as error:
                raise _BrokenItem(error) from error

    greedy = {**options, "temperature": 0.0, "max_tokens": suite.max_tokens}
    for number, answer in zip(missing, vlm.iterate(requests(), **greedy), strict=True):
        said[number] = answer.text
        journal.add(suite, number, blank, answer.text)
        advance()
    return [mark(suite.metric, said[number] or "", item.answers) for number, item in enumerate(suite.items)]


def _by_kind(suite: Suite, marks: list[Mark], grey: list[Mark] | None) -> dict[str, tuple[Score, Score | None]] | None:
    """Scores of each sort of question; None where all are of one."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(suite.items):
        places[item.kind].append(number)
    if len(places) < 2:
        return None

    def score(given: list[Mark], numbers: list[int]) -> Score:
        return summarise(suite.metric, [given[number] for number in numbers])

    return {
        kind or "other": (score(marks, numbers), score(grey, numbers) if grey else None)
        for kind, numbers in sorted(places.items())
    }
