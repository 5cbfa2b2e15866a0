"""Two pictures to compare, and short videos of something that moves."""

from __future__ import annotations

from random import Random

from draw import CANVAS, Picture, add_emoji, add_shape, background
from wordings import Turn, article, ask, rounds, yes_no
from world import World

PICTURES = ("first", "second")
FRAMES = 3
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def two(world: World, rng: Random) -> tuple[list[Picture], list[Turn]]:
    """Two pictures: of one shape each, of several shapes each, or of one emoji each."""
    makers, weights = [two_shapes, two_counts], [0.45, 0.3]
    if world.emoji:
        makers, weights = [*makers, two_emoji], [*weights, 0.25]
    return rng.choices(makers, weights)[0](world, rng)


def two_shapes(world: World, rng: Random) -> tuple[list[Picture], list[Turn]]:
    """The same shape or not, the same colour or not, one bigger than the other."""
    same_shape, same_colour = rng.random() < 0.5, rng.random() < 0.5
    first = world.combo(rng)
    while True:
        second = world.combo(rng, shape=first[0] if same_shape else None)
        if world.held_out and same_colour and not same_shape:
            same_colour = False  # one held-out colour a shape: another shape has another colour
        if world.held_out and same_shape:
            same_colour = True
        if (second[0] == first[0]) == same_shape and (second[1] == first[1]) == same_colour:
            break
    bigger = rng.randrange(2)
    pictures = []
    for index, (shape, colour) in enumerate((first, second)):
        picture = background(rng, {colour})
        radius = rng.uniform(72, 108) if index == bigger else rng.uniform(26, 46)
        low, high = radius, CANVAS - radius
        add_shape(picture, shape, colour, (rng.uniform(low, high), rng.uniform(low, high)), radius, rng)
        pictures.append(picture)
    shapes, colours = (first[0], second[0]), (first[1], second[1])

    def draw() -> list[Turn]:
        i, j = rng.randrange(2), rng.randrange(2)
        turns = [
            ask(rng, "same shape", yes_no(same_shape)),
            ask(rng, "same colour", yes_no(same_colour)),
            ask(rng, "picture of bigger", PICTURES[bigger]),
            ask(rng, "shape in picture", shapes[i], which=PICTURES[i]),
            ask(rng, "colour in picture", colours[j], which=PICTURES[j]),
        ]
        if not same_shape:
            turns.append(ask(rng, "picture with", PICTURES[i], a_claim=article(shapes[i])))
        rng.shuffle(turns)
        return turns

    return pictures, rounds(draw, world.rounds)


def two_counts(world: World, rng: Random) -> tuple[list[Picture], list[Turn]]:
    """One to five shapes in each; never as many in both."""
    counts = rng.sample(range(1, 6), 2)
    pictures = []
    for count in counts:
        shape, colour = world.combo(rng)
        picture = background(rng, {colour})
        radius = rng.uniform(24, 38)
        for spot in scatter(rng, count, radius):
            add_shape(picture, shape, colour, spot, radius * rng.uniform(0.8, 1), rng)
        pictures.append(picture)
    more = int(counts[1] > counts[0])

    def draw() -> list[Turn]:
        i = rng.randrange(2)
        return [
            ask(rng, "picture of more", PICTURES[more]),
            ask(rng, "count in picture", str(counts[i]), which=PICTURES[i]),
            ask(rng, "picture of fewer", PICTURES[1 - more]),
        ]

    return pictures, rounds(draw, world.rounds)


def two_emoji(world: World, rng: Random) -> tuple[list[Picture], list[Turn]]:
    """One emoji in each, the same or not."""
    kinds = [rng.choice(world.emoji_words)]
    kinds.append(kinds[0] if rng.random() < 0.4 else rng.choice([w for w in world.emoji_words if w != kinds[0]]))
    pictures = []
    for kind in kinds:
        picture = background(rng, set())
        picture.background = None
        side = rng.uniform(130, 230)
        xy = rng.uniform(side / 2, CANVAS - side / 2), rng.uniform(side / 2, CANVAS - side / 2)
        add_emoji(picture, rng.choice(world.emoji[kind]), kind, xy, side, rng)
        pictures.append(picture)

    def draw() -> list[Turn]:
        i = rng.randrange(2)
        turns = [
            ask(rng, "same thing", yes_no(kinds[0] == kinds[1])),
            ask(rng, "thing in picture", kinds[i], which=PICTURES[i]),
        ]
        if kinds[0] != kinds[1]:
            turns.append(ask(rng, "picture with", PICTURES[1 - i], a_claim=article(kinds[1 - i])))
        rng.shuffle(turns)
        return turns

    return pictures, rounds(draw, world.rounds)


def scatter(rng: Random, count: int, radius: float) -> list[tuple[float, float]]:
    """`count` centres at least 2.25 radii apart, fewer tries with smaller radii always succeed."""
    while True:
        margin = radius * 1.08
        spots: list[tuple[float, float]] = []
        for _ in range(60):
            spot = rng.uniform(margin, CANVAS - margin), rng.uniform(margin, CANVAS - margin)
            if all((spot[0] - x) ** 2 + (spot[1] - y) ** 2 > (2.25 * radius) ** 2 for x, y in spots):
                spots.append(spot)
                if len(spots) == count:
                    return spots
        radius *= 0.95


def video(world: World, rng: Random) -> tuple[list[Picture], list[Turn]]:
    """Three frames: one thing moves left, right, up or down, or grows or shrinks; sometimes another stays in place."""
    thing = rng.choice(world.emoji_words) if world.emoji and rng.random() < 0.35 else None
    shape, colour = world.combo(rng)
    other = world.combo(rng, avoid={colour}) if thing is None and rng.random() < 0.25 else None
    if other and other[0] == shape:
        other = None
    name = thing or shape
    change = rng.choice(["bigger", "smaller"]) if rng.random() < 0.2 and not other else None
    direction = rng.choice(list(DIRECTIONS))
    base = background(rng, {colour, other[1]} if other else {colour})
    if thing:
        base.background = None
        art = rng.choice(world.emoji[thing])
    paths = _frames(rng, change, direction, 44 if thing else 34)
    spot = rng.choice([(50, 50), (206, 50), (50, 206), (206, 206)])
    drawing, fixed = rng.getrandbits(32), rng.getrandbits(32)
    pictures = []
    for x, y, radius in paths:
        picture = Picture(base.image.copy(), background=base.background)
        if other:
            add_shape(picture, *other, spot, 26, Random(fixed))
        if thing:
            add_emoji(picture, art, thing, (x, y), radius * 2, Random(drawing))
        else:
            add_shape(picture, shape, colour, (x, y), radius, Random(drawing))
        pictures.append(picture)
    shade = None if thing else colour
    return pictures, rounds(lambda: _video_turns(rng, name, shade, change, direction, other), world.rounds)


def _frames(rng: Random, change: str | None, direction: str, radius: float) -> list[tuple[float, float, float]]:
    """Place and radius of the thing in each frame."""
    radius *= rng.uniform(0.85, 1.25)
    if change:
        small, large = rng.uniform(24, 36), rng.uniform(80, 104)
        radii = [small + (large - small) * i / (FRAMES - 1) for i in range(FRAMES)]
        x, y = rng.uniform(108, 148), rng.uniform(108, 148)
        return [(x, y, r) for r in (radii if change == "bigger" else radii[::-1])]
    low, high = radius + 4, CANVAS - radius - 4
    way = rng.uniform(0.55, 1) * (high - low)
    start, across = rng.uniform(low, high - way), rng.uniform(low, high)
    along = [start + way * i / (FRAMES - 1) for i in range(FRAMES)]
    dx, dy = DIRECTIONS[direction]
    if dx + dy < 0:
        along.reverse()
    return [(a, across, radius) if dx else (across, a, radius) for a in along]


def _video_turns(
    rng: Random, name: str, colour: str | None, change: str | None, direction: str, other: tuple[str, str] | None
) -> list[Turn]:
    if change:
        turns = [ask(rng, "grows", change, shape=name), ask(rng, "thing in video", name)]
    else:
        claim = direction if rng.random() < 0.5 else rng.choice([d for d in DIRECTIONS if d != direction])
        turns = [
            ask(rng, "direction", direction, shape=name),
            ask(rng, "moves", name),
            ask(rng, "is direction", yes_no(claim == direction), shape=name, claim=claim),
        ]
    if other:
        turns.append(ask(rng, "stays", other[0]))
    if colour:
        turns.append(ask(rng, "colour", colour, shape=name if not change else "shape"))
    rng.shuffle(turns)
    return turns
