"""Charts for the held-out test, drawn by matplotlib in its own light styles, with the questions of `charts.py`.

The training charts are drawn by Pillow. Here axes, grids, panels, tick labels, letters (DejaVu Sans) and proportions
are another program's; what is asked is the same.
"""

from __future__ import annotations

import io
from random import Random
from typing import Any

from PIL import Image

from charts import KINDS_OF_CHART, bar_turns, kind_turn, pie_turns, unlike_colours
from draw import CANVAS, rgb
from wordings import Turn, ask

STYLES = (
    "default", "classic", "ggplot", "bmh", "fivethirtyeight", "Solarize_Light2", "seaborn-v0_8",
    "seaborn-v0_8-whitegrid", "seaborn-v0_8-ticks", "tableau-colorblind10",
)  # fmt: skip
KINDS = {"extremes": 60, "value": 45, "count": 30, "compare": 25, "pie": 50, "line": 25, "which chart": 15}
"""Sort of question → how many in the test."""
_ABOUT = {
    "extremes": {"tallest letter", "shortest letter", "tallest colour", "shortest colour"},
    "value": {"value of letter", "value of colour"},
    "count": {"count of bars", "count of slices"},
    "compare": {"taller", "bigger slice"},
    "pie": {"biggest slice", "smallest slice"},
    "line": {"line direction", "line colour"},
    "which chart": {"chart kind", "chart choice"},
}
DPI = 100


def chart(rng: Random, kind: str) -> tuple[Image.Image, Turn, str]:
    """A chart of 256×256, a question of that kind, and the style it is drawn in."""
    drawers = [bars, pie, line] if kind == "which chart" else [pie] if kind == "pie" else [line]
    if kind in ("extremes", "value", "count", "compare"):
        drawers = [bars, bars, bars, pie] if kind in ("count", "compare") else [bars]
    while True:
        style = rng.choice(STYLES)
        image, turns = drawn(rng.choice(drawers), rng, style)
        asked = [turn for turn in turns if turn.about in _ABOUT[kind]]
        if asked:
            return image, rng.choice(asked), style


def drawn(drawer: Any, rng: Random, style: str) -> tuple[Image.Image, list[Turn]]:
    """What a drawer puts on an empty figure of that style."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.style.context(style):
        figure, axes = pyplot.subplots(figsize=(CANVAS / DPI, CANVAS / DPI), dpi=DPI, layout="constrained")
        turns = drawer(axes, rng)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        pyplot.close(figure)
    return Image.open(file).convert("RGB"), turns


def bars(axes: Any, rng: Random) -> list[Turn]:
    """Two to five bars as the recipe has them: by letter or colour, sometimes with their values."""
    count = rng.randint(2, 5)
    lettered = rng.random() < 0.5
    valued = rng.random() < 0.45 and count < 5
    several = not lettered or rng.random() < 0.4
    colours = unlike_colours(rng, count) if several else unlike_colours(rng, 1) * count
    letters = list("ABCDE")[:count]
    values = rng.sample(range(1, 10), count)
    places = list(range(count))
    drawn_bars = axes.bar(places, values, width=rng.uniform(0.5, 0.85), color=[_hex(c, rng) for c in colours])
    axes.set_xticks(places if lettered else [], letters if lettered else [], fontsize=rng.choice([22, 24, 26]))
    axes.tick_params(axis="y", labelsize=rng.choice([6, 7, 8]))
    if valued:
        axes.bar_label(drawn_bars, fontsize=rng.choice([22, 24, 26]))
        axes.set_ylim(0, max(values) * 1.3)
        axes.set_yticks([])
    return bar_turns(rng, values, colours if several else None, letters if lettered else None, valued)


def pie(axes: Any, rng: Random) -> list[Turn]:
    """Two to five slices; the largest and the smallest are clear."""
    count = rng.randint(2, 5)
    while True:
        weights = [rng.uniform(1, 4) for _ in range(count)]
        ordered = sorted(weights)
        if ordered[-1] > 1.35 * ordered[-2] and (count == 2 or ordered[1] > 1.35 * ordered[0]):
            break
    colours = unlike_colours(rng, count)
    edge = {"linewidth": 1.5, "edgecolor": "white"} if rng.random() < 0.4 else {}
    ring = {"width": 0.6} if rng.random() < 0.2 else {}
    axes.pie(weights, colors=[_hex(c, rng) for c in colours], startangle=rng.uniform(0, 360), wedgeprops=edge | ring)
    return pie_turns(rng, weights, colours)


def line(axes: Any, rng: Random) -> list[Turn]:
    """A line that rises or falls, with small steps back."""
    (colour,) = unlike_colours(rng, 1)
    count, up = rng.randint(4, 9), rng.random() < 0.5
    levels = [i + rng.uniform(-0.45, 0.45) for i in range(count)]
    axes.plot(
        levels if up else levels[::-1], color=_hex(colour, rng), linewidth=rng.uniform(2, 4),
        marker=rng.choice(["", "", "o", "s"]),
    )  # fmt: skip
    axes.tick_params(labelsize=rng.choice([6, 7, 8]))
    return [
        ask(rng, "line direction", "up" if up else "down"),
        kind_turn(rng, KINDS_OF_CHART[2]),
        ask(rng, "line colour", colour),
    ]


def _hex(colour: str, rng: Random) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb(colour, rng))
