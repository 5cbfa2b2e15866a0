"""Simple charts, drawn in the manner of plotting programs: bars, pies and lines in many styles."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from draw import CANVAS, COLOURS, Picture, add_text, font, rgb
from wordings import Turn, ask, options, rounds, yes_no
from world import World

KINDS_OF_CHART = ["bar chart", "pie chart", "line chart"]
_BRIGHT = [colour for colour in COLOURS if colour not in ("white", "gray", "black")]
_UNLIKE = [{"red", "orange"}, {"orange", "yellow"}, {"red", "pink"}, {"purple", "pink"}, {"brown", "orange"},
           {"brown", "red"}, {"blue", "purple"}]  # fmt: skip


def unlike_colours(rng: Random, count: int) -> list[str]:
    """Colours of which no two are easily mistaken for each other."""
    while True:
        chosen = rng.sample(_BRIGHT, count)
        if not any(pair <= set(chosen) for pair in _UNLIKE):
            return chosen


def canvas(rng: Random) -> Picture:
    """White, or nearly; plots are drawn on light paper."""
    if rng.random() < 0.6:
        return Picture(Image.new("RGB", (CANVAS, CANVAS), (255, 255, 255)), background="white")
    shade = rng.randint(232, 250)
    tint = tuple(min(255, shade + rng.randint(-4, 4)) for _ in "rgb")
    return Picture(Image.new("RGB", (CANVAS, CANVAS), tint))


def axes(picture: Picture, rng: Random, box: tuple[float, float, float, float], path: str = "") -> None:
    """A panel, spines or a whole frame, a grid, ticks and, with a font, small numbers at them: each only sometimes."""
    draw = ImageDraw.Draw(picture.image)
    left, top, right, bottom = box
    ink, pale = (rng.randint(0, 120),) * 3, (rng.randint(200, 226),) * 3
    if rng.random() < 0.3:  # a tinted panel, mostly with a white grid
        shade = rng.randint(222, 246)
        draw.rectangle([left, top, right, bottom], fill=tuple(min(255, shade + rng.randint(-12, 9)) for _ in "rgb"))
        pale = (255, 255, 255) if rng.random() < 0.7 else pale
    rungs = rng.randint(3, 8)
    heights = [bottom + (top - bottom) * i / rungs for i in range(rungs + 1)]
    if rng.random() < 0.5:
        for y in heights[1:]:
            draw.line([(left, y), (right, y)], fill=pale, width=rng.choice([1, 2, 2]))
        if rng.random() < 0.5:
            posts = rng.randint(2, 6)
            for i in range(posts):
                x = left + (right - left) * (i + 0.5) / posts
                draw.line([(x, top), (x, bottom)], fill=pale, width=2)
    width = rng.choice([2, 2, 3, 4])
    frame = rng.random()
    if frame < 0.4:
        draw.rectangle([left, top, right, bottom], outline=ink, width=width)
    elif frame < 0.85:
        draw.line([(left, bottom), (right, bottom)], fill=ink, width=width)
        if rng.random() < 0.7:
            draw.line([(left, top), (left, bottom)], fill=ink, width=width)
    if rng.random() < 0.5:
        for y in heights:
            draw.line([(left - 6, y), (left, y)], fill=ink, width=2)
    if path and rng.random() < 0.5:  # too small to be asked about
        face = font(path, rng.choice([12, 16]))
        for i, y in enumerate(heights):
            draw.text((left - 7, y), str(i), font=face, fill=ink, anchor="rm")


def chart(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """A bar chart, a pie chart or a line chart."""
    return rng.choices([bars, pie, line], [0.85, 0.1, 0.05])[0](world, rng)


def kind_turn(rng: Random, kind: str) -> Turn:
    pool = KINDS_OF_CHART
    return ask(rng, "chart kind" if rng.random() < 0.6 else "chart choice", kind, options=options(rng, kind, pool))


def bars(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """Two to five bars, of distinct colours or of one; with letters under them, or values over them, or neither."""
    count = rng.randint(2, 5)
    picture = canvas(rng)
    lettered = rng.random() < 0.5 and bool(world.fonts)
    valued = rng.random() < 0.85 and bool(world.fonts) and count < 5
    several = not lettered or rng.random() < 0.4
    colours = unlike_colours(rng, count) if several else [rng.choice(_BRIGHT)] * count
    letters = list("ABCDE")[:count] if rng.random() < 0.6 else sorted(rng.sample("ABCDEFGHKLMNPRSTXYZ", count))
    values = rng.sample(range(1, 10), count)
    left, right, top = rng.uniform(12, 40), CANVAS - rng.uniform(8, 24), rng.uniform(46, 56) if valued else 18
    bottom = CANVAS - (rng.uniform(44, 52) if lettered else rng.uniform(14, 36))
    path = rng.choice(world.fonts) if world.fonts else ""
    axes(picture, rng, (left, top if not valued else 8, right, bottom), "" if valued else path)
    step = (right - left) / count
    share = rng.uniform(0.5, 0.85)
    for i, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x0 = left + step * (i + 0.5 - share / 2)
        y0 = bottom - (bottom - top) * value / max(values)
        size = max(4, round(step * share)), max(4, round(bottom - y0))
        picture.stamp(Image.new("L", size, 255), (round(x0), round(y0)), rgb(colour, rng), "bar", colour)
        columns = left + step * i - 6, left + step * (i + 1) + 6
        if lettered:
            add_text(picture, letters[i], path, "black", rng, 30, (bottom, CANVAS), columns)
        if valued:
            add_text(picture, str(value), path, "black", rng, 28, (max(0, y0 - 46), y0 + 2), columns)
    names = colours if several else None, letters if lettered else None
    return picture, rounds(lambda: bar_turns(rng, values, *names, valued), world.rounds, 14)


def bar_turns(
    rng: Random, values: list[int], colours: list[str] | None, letters: list[str] | None, valued: bool
) -> list[Turn]:
    """Questions about bars, by letter or by colour where they have one."""
    best, least = values.index(max(values)), values.index(min(values))
    turns = [ask(rng, "count of bars", str(len(values))), kind_turn(rng, "bar chart")]
    if letters:
        turns += [ask(rng, "tallest letter", letters[best]), ask(rng, "shortest letter", letters[least])]
    if colours:
        turns += [ask(rng, "tallest colour", colours[best]), ask(rng, "shortest colour", colours[least])]
        i, j = rng.sample(range(len(values)), 2)
        turns.append(ask(rng, "taller", yes_no(values[i] > values[j]), shape=colours[i], other=colours[j]))
    if valued:
        for i in rng.sample(range(len(values)), min(2, len(values))):
            if letters and (not colours or rng.random() < 0.5):
                turns.append(ask(rng, "value of letter", str(values[i]), letter=letters[i]))
            elif colours:
                turns.append(ask(rng, "value of colour", str(values[i]), colour=colours[i]))
    rng.shuffle(turns)
    return turns[:6]


def pie(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """Two to five slices of distinct colours; the largest and the smallest are clear."""
    count = rng.randint(2, 5)
    while True:
        weights = [rng.uniform(1, 4) for _ in range(count)]
        ordered = sorted(weights)
        if ordered[-1] > 1.35 * ordered[-2] and (count == 2 or ordered[1] > 1.35 * ordered[0]):
            break
    picture, colours = canvas(rng), unlike_colours(rng, count)
    radius = rng.uniform(80, 118)
    x, y = (rng.uniform(radius + 6, CANVAS - radius - 6) for _ in "xy")
    start, total = rng.uniform(0, 360), sum(weights)
    ring = rng.random() < 0.2
    edge = rng.random() < 0.4
    for colour, weight in zip(colours, weights, strict=True):
        mask = Image.new("L", (CANVAS, CANVAS), 0)
        draw = ImageDraw.Draw(mask)
        stop = start + 360 * weight / total
        draw.pieslice([x - radius, y - radius, x + radius, y + radius], start, stop, fill=255)
        if ring:
            hole = radius * 0.4
            draw.ellipse([x - hole, y - hole, x + hole, y + hole], fill=0)
        picture.stamp(mask, (0, 0), rgb(colour, rng), "slice", colour)
        if edge and not ring:
            ImageDraw.Draw(picture.image).pieslice(
                [x - radius, y - radius, x + radius, y + radius], start, stop, outline=(255, 255, 255), width=3
            )
        start = stop
    turns = rounds(lambda: pie_turns(rng, weights, colours), world.rounds)
    rng.shuffle(turns)
    return picture, turns


def pie_turns(rng: Random, weights: list[float], colours: list[str]) -> list[Turn]:
    """Questions about slices."""
    big, small = weights.index(max(weights)), weights.index(min(weights))
    i, j = rng.sample(range(len(weights)), 2)
    turns = [
        ask(rng, "count of slices", str(len(weights))),
        kind_turn(rng, "pie chart"),
        ask(rng, "biggest slice", colours[big]),
        ask(rng, "smallest slice", colours[small]),
    ]
    if max(weights[i], weights[j]) > 1.25 * min(weights[i], weights[j]):
        turns.append(ask(rng, "bigger slice", yes_no(weights[i] > weights[j]), shape=colours[i], other=colours[j]))
    return turns


def line(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """A line that rises or falls."""
    picture, colour = canvas(rng), rng.choice(_BRIGHT)
    box = rng.uniform(12, 36), rng.uniform(12, 30), CANVAS - rng.uniform(8, 24), CANVAS - rng.uniform(14, 36)
    axes(picture, rng, box, rng.choice(world.fonts) if world.fonts else "")
    count, up = rng.randint(3, 9), rng.random() < 0.5
    levels = [(i + rng.uniform(-0.45, 0.45)) / (count - 1) for i in range(count)]
    low, high = rng.uniform(0.05, 0.3), rng.uniform(0.7, 0.95)
    levels = [low + (high - low) * v for v in (levels if up else levels[::-1])]
    left, top, right, bottom = box
    points = [
        (left + (right - left) * (i + 0.3) / (count - 0.4), bottom - (bottom - top) * min(0.98, max(0.02, v)))
        for i, v in enumerate(levels)
    ]
    mask, cover = Image.new("L", (CANVAS, CANVAS), 0), Image.new("L", (CANVAS, CANVAS), 0)
    pen = rng.choice([4, 5, 6, 8, 10])
    ImageDraw.Draw(mask).line(points, fill=255, width=pen, joint="curve")
    if rng.random() < 0.4:
        for px, py in points:
            ImageDraw.Draw(mask).ellipse([px - pen * 1.3, py - pen * 1.3, px + pen * 1.3, py + pen * 1.3], fill=255)
    picture.stamp(mask, (0, 0), rgb(colour, rng), "line", colour)
    ImageDraw.Draw(cover).line(points, fill=255, width=20)
    picture.cover.paste(len(picture.kinds), (0, 0), cover)
    turns = [
        ask(rng, "line direction", "up" if up else "down"),
        kind_turn(rng, "line chart"),
        ask(rng, "line colour", colour),
    ]
    rng.shuffle(turns)
    return picture, turns
