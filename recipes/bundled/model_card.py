"""MODEL_CARD.md, and the table in README.md, from what was measured: RESULTS.json, BASELINES.json and RUN.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Table = dict[str, dict[str, Any]]

GOALS = {
    "emoji_unseen_art": 0.65, "flags_unseen_set": 0.95, "sketches": 0.70, "shapes": 0.97, "reading_unseen_fonts": 0.04,
    "charts": 0.90,
}  # fmt: skip
"""What the project asked of this model. The two others have no goal."""
ASKED = {
    "emoji_unseen_art": "75 kinds of emoji in Microsoft's Fluent art; trained on Noto, Noto v1, Twemoji, EmojiOne, "
    "Firefox OS",
    "flags_unseen_set": "50 flags as Twemoji draws them; trained on four other sets",
    "sketches": "40 kinds of Quick, Draw! drawings, 6 each of the 20 that were held out",
    "shapes": "shape, colour, size, place, relation, side, bigger, count; each shape in a colour never seen with it",
    "reading_unseen_fonts": "numbers of 1–3 digits and 1–6 words in capitals, unseen, in eight unseen font families",
    "charts": "bars, pies and lines drawn by matplotlib in ten styles; trained on charts drawn by Pillow",
    "two_pictures": "same or not, which one, what is in which; unseen pairs and art",
    "video": "three frames: what moves where, what grows; unseen pairs and art",
}
LONGER = 10
"""Times the pictures of the run that is described."""


PAGE = """\
# Model card: the bundled model

<!-- Written by recipes/bundled/model_card.py from RESULTS.json, BASELINES.json and RUN.json. -->

`smolvlm_fms.load("demo")`: SmolVLM's architecture with {size}, trained from nothing to answer short
questions about simple pictures. How it is built and trained: [README.md](README.md). Where its material comes from:
[ATTRIBUTION.md](../../src/smolvlm_fms/assets/ATTRIBUTION.md). Licence: Apache-2.0.

## Results
Held-out tests, `smolvlm eval demo`: greedy answers, right to the word (`exact`), or edits per character (`cer`, lower
is better). *Grey picture* asks the same questions with a grey picture: what the model knows without looking. The
interval is for questions like these; several questions may show the same piece of art.

{results}

*Nearest neighbour* gives the name of the training picture that is most alike in the features of EfficientNet-Lite0,
which was trained on 1.28 million photographs (this model on none). *tesseract* sees the pictures at 256×256, this model
at 128×128. The goal for emoji was set where the nearest neighbour reached 55 %; among these 75 kinds it reaches more.

What is asked, and how it differs from what was trained on:

{asked}

By sort of question:

{kinds}

### Against the goals
{shortfalls}

{training}
## Data
Everything is drawn by the recipe: shapes, charts and clips by its own generators; emoji, flags and drawings from npm
packages; words in Debian's fonts. No photograph, no text from the web, no person's data. The tests come from the other
side of the split: other art, other fonts, other words, other drawings, other pairs of shape and colour.

## Limits
- It knows its skills and nothing else: photographs, faces, scenes, documents, conversation and facts are beyond it, and
  it does not say so; it answers with one of the words that it knows.
- English, and the questions' wordings of `wordings.py`; other wordings may be misread.
- Pictures are seen at 128×128: small print, long texts and fine detail are lost. Text in capitals and digits only.
- Flags of 50 countries, 75 kinds of emoji, 40 kinds of sketches; counts to six; clips of three frames.
- Not for any decision about people. It is there to show and to test the software.
"""


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def results_table(results: dict[str, Any], baselines: Table) -> list[str]:
    """Markdown rows: score, interval, grey picture, goal and baselines of every test."""
    lines = [
        "| test | metric | score | 95 % | grey picture | goal | baseline | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["skills"].items():
        low, high = results["details"][name].get("interval", (None, None))
        goal = GOALS.get(name)
        sign = "≤" if row["metric"] == "cer" else "≥"
        others = "; ".join(f"{percent(other['score'])} ({what})" for what, other in baselines.get(name, {}).items())
        lines.append(
            f"| {name} | {row['metric']} | **{percent(row['score'])}** | {percent(low)} – {percent(high)} | "
            f"{percent(row['blank'])} | {f'{sign} {goal:.0%}' if goal else '–'} | {others or '–'} | {row['n']} |"
        )
    return lines


def kinds_table(results: dict[str, Any]) -> list[str]:
    """Markdown rows: every sort of question of the tests that have several."""
    lines = ["| test | sort | score | grey picture | n |", "|---|---|---|---|---|"]
    for name, details in results["details"].items():
        for kind, row in details.get("kinds", {}).items():
            lines.append(f"| {name} | {kind} | {percent(row['score'])} | {percent(row['blank'])} | {row['n']} |")
    return lines


def shortfalls(results: dict[str, Any]) -> list[str]:
    """Markdown lines: which goals are met, and by how much the others are missed."""
    lines = []
    for name, goal in GOALS.items():
        row = results["skills"].get(name)
        if row is None or row["score"] is None:
            lines.append(f"- **{name}**: not measured.")
            continue
        less = row["score"] - goal if row["metric"] == "cer" else goal - row["score"]
        verdict = "goal met" if less <= 0 else f"{less * 100:.1f} points short of the goal"
        lines.append(f"- **{name}**: {verdict} ({percent(row['score'])}, goal {goal:.0%}).")
    return lines


def error(metric: str, score: float) -> float:
    return score if metric == "cer" else 1 - score


def longer_run(results: dict[str, Any], curve: list[dict[str, Any]]) -> dict[str, float]:
    """Scores to expect of a run `LONGER` times as long: errors fall as a power of the pictures seen, as they did over
    the last two points of the curve (and never rise)."""
    if len(curve) < 2:
        return {}
    earlier, last = curve[-2:]
    found = {}
    for name, score in last["skills"].items():
        metric = results["skills"].get(name, {}).get("metric", "exact")
        before, now = (max(1e-3, error(metric, point["skills"].get(name, score))) for point in (earlier, last))
        slope = min(0.0, math.log(now / before) / math.log(last["pictures"] / earlier["pictures"]))
        left = now * LONGER**slope
        found[name] = left if metric == "cer" else 1 - left
    return found


def card(results: dict[str, Any], baselines: Table, run: dict[str, Any], picture: bool) -> str:
    """The whole document."""
    expected = longer_run(results, run.get("curve", []))
    return PAGE.format(
        size=f"{run['parameters'] / 1e6:.1f} M parameters" if "parameters" in run else "a few million parameters",
        results="\n".join(results_table(results, baselines)),
        asked="\n".join(f"- **{name}**: {ASKED[name]}." for name in results["skills"] if name in ASKED),
        kinds="\n".join(kinds_table(results)),
        shortfalls="\n".join(shortfalls(results)),
        training="\n".join([*training(run, picture), *estimate(results, expected)]),
    )


def training(run: dict[str, Any], picture: bool) -> list[str]:
    """What the run was."""
    lines = ["## Training"]
    if "pictures" in run:
        lines += [
            f"{run['pictures']:,} pictures in {run.get('hours', 0):.1f} hours on {run.get('machine', 'a CPU')}.",
            "",
        ]
    lines += [f"- {part}" for part in run.get("parts", [])]
    if picture:
        lines += ["", "![Learning curve](curve.svg)"]
    return [*lines, ""]


def estimate(results: dict[str, Any], expected: dict[str, float]) -> list[str]:
    """What a longer run would be expected to give."""
    if not expected:
        return []
    shown = "; ".join(f"{name} {percent(results['skills'].get(name, {}).get('score'))} → {percent(score)}"
                      for name, score in expected.items())  # fmt: skip
    return [
        f"### A run {LONGER} times as long (an estimate, not measured)",
        "Errors extrapolated as a power of the pictures seen, with the slope between the last two points of the curve:",
        f"{shown}.",
        "Where the tests' art differs from the training art, more pictures of the same art help less than this.",
        "",
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(folder: Path) -> None:
    """Write both documents into the recipe's folder."""
    results, baselines, run = (read(folder / f"{name}.json") for name in ("RESULTS", "BASELINES", "RUN"))
    text = card(results, baselines, run, (folder / "curve.svg").exists())
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    readme = folder / "README.md"
    page = readme.read_text(encoding="utf-8")
    start, end = page.index("<!-- results -->") + len("<!-- results -->"), page.index("<!-- /results -->")
    table = "\n".join(results_table(results, baselines))
    readme.write_text(page[:start] + "\n" + table + "\n" + page[end:], encoding="utf-8")
