"""What the bundled model is taught: pictures with several questions each, the same for the same seed.

A `Sample` has pictures and turns (question, answer). Training draws from one side of every split, the held-out tests
from the other: pairs of shape and colour, fonts, words, the art of the emoji, flags and sketches are never shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from charts import chart
from draw import (
    CANVAS,
    COLOURS,
    SHAPES,
    Picture,
    add_emoji,
    add_flag,
    add_shape,
    add_sketch,
    add_text,
    background,
    finish,
)
from several import scatter, two, video
from wordings import Turn, article, ask, options, plural, rounds, yes_no
from world import COMBOS_HELD_OUT, KINDS, World, place_of

__all__ = ["COMBOS_HELD_OUT", "KINDS", "MAKERS", "MIXTURE", "SINGLE_PICTURE", "Sample", "World", "make", "place_of"]


@dataclass
class Sample:
    """`pixels` (N, 128, 128, 3) uint8, one a picture or frame; `turns` questions and their answers; `targets`
    (N, 6, 64) int64, the dense targets of `draw.FIELDS`.
    """

    skill: str
    pixels: np.ndarray
    turns: list[Turn]
    targets: np.ndarray

    @property
    def is_video(self) -> bool:
        return self.skill == "video"


def thing_turns(rng: Random, kind: str, noun: str, pool: list[str], about: str) -> tuple[Turn, Turn, Turn]:
    """A yes/no, a multiple-choice and an open question about the one thing in a picture."""
    claim = kind if rng.random() < 0.5 else rng.choice([p for p in pool if p != kind])
    return (
        ask(rng, "is it", yes_no(claim == kind), a_claim=article(claim)),
        ask(rng, "choice", kind, noun=noun, options=options(rng, kind, pool)),
        ask(rng, about, kind),
    )


def picked(world: World, rng: Random, closed: list[Turn]) -> list[Turn]:
    """One of the questions with a closed answer in tests, all of them in training."""
    return [rng.choice(closed)] if world.held_out else closed


def side_turns(rng: Random, noun: str, x: float, y: float) -> list[Turn]:
    """Which half of the picture something is in, where that is clear."""
    turns = []
    if abs(x - CANVAS / 2) > 0.12 * CANVAS:
        turns.append(ask(rng, "left or right", "left" if x < CANVAS / 2 else "right", shape=noun))
    if abs(y - CANVAS / 2) > 0.12 * CANVAS:
        turns.append(ask(rng, "top or bottom", "top" if y < CANVAS / 2 else "bottom", shape=noun))
    return turns


def single(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """One shape: what, which colour, how big, where."""
    shape, colour = world.combo(rng)
    # shapes in colours that are nobody's: or else a tower takes a shape and its usual colours for one thing
    nameless = not world.held_out and rng.random() < 0.2
    picture = background(rng, {colour})
    big = rng.random() < 0.4
    radius = rng.uniform(72, 112) if big else rng.uniform(24, 42)
    lowest, highest = radius * 0.95, CANVAS - radius * 0.95
    x, y = rng.uniform(lowest, highest), rng.uniform(lowest, highest)
    if not big and rng.random() < 0.5:
        x, y = (rng.choice([rng.uniform(28, 80), rng.uniform(112, 144), rng.uniform(176, 228)]) for _ in "xy")
    add_shape(picture, shape, None if nameless else colour, (x, y), radius, rng)
    size, where = "big" if big else "small", place_of(x, y)

    def claimed() -> Turn:
        claim = colour if rng.random() < 0.5 else rng.choice([c for c in COLOURS if c != colour])
        return ask(rng, "is colour", yes_no(claim == colour), shape=shape, claim=claim)

    def draw() -> list[Turn]:
        turns = [
            rng.choice(thing_turns(rng, shape, "shape", list(SHAPES), "shape")),
            ask(rng, "colour", colour, shape=shape),
            ask(rng, "size", size, shape=shape),
        ]
        if nameless:
            turns.pop(1)
        elif rng.random() < 0.4:
            turns[1] = claimed()
        if not world.held_out:  # a claim of each sort in every round
            turns.append(thing_turns(rng, shape, "shape", list(SHAPES), "shape")[0])
            if not nameless:
                turns.append(claimed())
        if where and not big:
            turns.append(ask(rng, "place", where, shape=shape))
        turns += side_turns(rng, shape, x, y)
        if picture.background and rng.random() < 0.5:
            turns.append(ask(rng, "background", picture.background))
        rng.shuffle(turns)
        return turns

    turns = rounds(draw, world.rounds, 16)
    if nameless:
        return picture, turns
    spot = f" at the {where}" if where and not big else ""
    turns.append(ask(rng, "description", article(f"{size} {colour} {shape}") + spot))
    return picture, turns


def pair(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """Two different shapes of different colours: which is which, left, above, bigger."""
    first = world.combo(rng)
    second = world.combo(rng, avoid={first[1]})
    while second[0] == first[0]:
        second = world.combo(rng, avoid={first[1]})
    picture = background(rng, {first[1], second[1]})
    sideways = rng.random() < 0.5
    radii = [rng.uniform(26, 40), rng.uniform(44, 60)]
    rng.shuffle(radii)
    along = [rng.uniform(44, 78), rng.uniform(178, 212)]
    across = [rng.uniform(60, 196) for _ in range(2)]
    for (shape, colour), radius, a, b in zip((first, second), radii, along, across, strict=True):
        add_shape(picture, shape, colour, (a, b) if sideways else (b, a), radius, rng)
    bigger = 0 if radii[0] > radii[1] else 1
    turns = rounds(lambda: pair_turns(rng, first, second, sideways, bigger), world.rounds, 14)
    if rng.random() < 0.5:
        where = ("on the left", "on the right") if sideways else ("at the top", "at the bottom")
        words = [f"{article(f'{c} {s}')} {w}" for (s, c), w in zip((first, second), where, strict=True)]
        turns.append(ask(rng, "description", " and ".join(words)))
    return picture, turns


def pair_turns(rng: Random, first: tuple[str, str], second: tuple[str, str], sideways: bool, bigger: int) -> list[Turn]:
    """Six of the questions about two shapes; `first` is left of or above `second`."""
    shapes, colours = (first[0], second[0]), (first[1], second[1])
    sides = ("left", "right") if sideways else ("top", "bottom")
    relations = ("left of", "right of") if sideways else ("above", "below")
    i, j, k, relation = (rng.randrange(2) for _ in range(4))
    claim = rng.choice(colours if rng.random() < 0.6 else COLOURS), rng.choice(shapes)
    if rng.random() < 0.5:
        side = ask(rng, "side", shapes[k], side=sides[k])
    else:
        side = ask(rng, "side colour", colours[k], side=sides[k])
    turns = [
        ask(rng, "colour of", colours[i], shape=shapes[i]),
        ask(rng, "shape of", shapes[1 - i], colour=colours[1 - i]),
        side,
        ask(rng, "relation", yes_no(j == relation), shape=shapes[j], relation=relations[relation], other=shapes[1 - j]),
        ask(rng, "bigger", shapes[bigger], shape=shapes[0], other=shapes[1]),
        ask(rng, "where of two", sides[i], shape=shapes[i], near=sides[0], far=sides[1]),
        ask(rng, "is there", yes_no(claim[::-1] in (first, second)), a_claim=article(" ".join(claim))),
    ]
    rng.shuffle(turns)
    return turns[:6]


def count(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """One to six shapes, of one kind or of two."""
    total = rng.randint(1, 6)
    shape, colour = world.combo(rng)
    second = world.combo(rng, avoid={colour})
    while second[0] == shape:
        second = world.combo(rng, avoid={colour})
    others = rng.randint(1, total - 1) if total > 1 and rng.random() < 0.45 else 0
    mixed = rng.random() < 0.3 and not others and not world.held_out  # one held-out colour a shape is no mixture
    picture = background(rng, set(COLOURS) - {"white", "black"} if mixed else {colour, second[1]})
    radius = rng.uniform(22, 36) if total > 3 else rng.uniform(24, 48)
    for index, spot in enumerate(scatter(rng, total, radius)):
        kind, shade = second if index < others else (shape, colour)
        if mixed:
            kind, shade = world.combo(rng, shape=shape, avoid={picture.background or ""})
        named = None if mixed and rng.random() < 0.3 else shade
        add_shape(picture, kind, named, spot, radius * rng.uniform(0.8, 1.0), rng)

    def draw() -> list[Turn]:
        turns = [ask(rng, "count", str(total))]
        if others:
            for (kind, shade), number in ((second, others), ((shape, colour), total - others)):
                about = rng.choice(["count of kind", "count of colour"])
                turns.append(ask(rng, about, str(number), plural=plural(kind), colour=shade))
        else:
            if rng.random() < 0.5:
                turns[0] = ask(rng, "count of kind", str(total), plural=plural(shape))
            if not mixed:
                turns.append(ask(rng, "colour of all" if total > 1 else "colour", colour, shape="shape"))
            turns.append(ask(rng, "shape of all" if total > 1 else "shape", shape))
        rng.shuffle(turns)
        return turns

    return picture, rounds(draw, world.rounds)


# Two lists of colours too alike to write one on the other.
_TOO_NEAR = (
    {"black", "brown", "purple", "blue"},
    {"white", "yellow", "pink"},
    {"red", "orange", "brown"},
    {"gray", "green", "purple", "blue"},
)


def written(world: World, rng: Random, text: str, about: str) -> tuple[Picture, list[Turn]]:
    """A number or words in large letters, each word on a line of its own."""
    colour = rng.choice(COLOURS)
    avoid = {colour}.union(*(near for near in _TOO_NEAR if colour in near))
    if rng.random() < 0.4:
        colour, avoid = "black", set(COLOURS) - {"white", "yellow", "pink"}
    picture = background(rng, avoid)
    path, lines = rng.choice(world.fonts), text.split()
    share = rng.uniform(0.6, 1.0)
    for index, line in enumerate(lines):
        most = {1: 120, 2: 200, 3: 240}.get(len(line), 248)
        rows = (CANVAS / len(lines) * index, CANVAS / len(lines) * (index + 1))
        add_text(picture, line, path, colour, rng, share * most if len(line) < 4 else max(share, 0.75) * most, rows)
    sign = "digit" if about == "digits" else "letter"

    def draw() -> list[Turn]:
        turns = [ask(rng, about if len(lines) == 1 else "lines", text)]
        if len(lines) == 1:
            turns.append(ask(rng, "length", str(len(text)), sign=sign))
            if len(text) > 1:
                turns += [ask(rng, "first of", text[0], sign=sign), ask(rng, "last of", text[-1], sign=sign)]
        if rng.random() < 0.3:
            turns.append(ask(rng, "ink", colour, written="number" if about == "digits" else "text"))
        if rng.random() < 0.2 and picture.background:
            turns.append(Turn("What color is the background?", picture.background, "background"))
        rng.shuffle(turns)
        return turns

    return picture, rounds(draw, min(2, world.rounds))


def number(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """A number of one to three digits."""
    digits = rng.choice([1, 1, 2, 2, 3])
    text = str(rng.randint(0, 9)) if digits == 1 else str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    return written(world, rng, text, "digits")


def word(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """One to six words in capitals, of two to five letters; in training three in ten are letters drawn at random."""
    words = []
    for _ in range(rng.choices([1, 2, 3, 4, 5, 6], [0.4, 0.2, 0.13, 0.11, 0.09, 0.07])[0]):
        if world.held_out or rng.random() < 0.7:
            words.append(rng.choice(world.words).upper())
        else:
            letters = ""
            while not letters or letters.lower() in world.banned:
                letters = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 5)))
            words.append(letters)
    return written(world, rng, " ".join(words), "words")


def flag(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """One flag on a plain background."""
    countries = [country for country, pictures in world.flags.items() if pictures]
    country = rng.choice(countries)
    picture = background(rng, set())
    picture.background = None
    add_flag(picture, rng.choice(world.flags[country]), country, rng)

    def draw() -> list[Turn]:
        claim = country if rng.random() < 0.5 else rng.choice([c for c in countries if c != country])
        closed = [
            ask(rng, "is flag", yes_no(claim == country), claim=claim),
            ask(rng, "flag choice", country, options=options(rng, country, countries)),
        ]
        turns = [*picked(world, rng, closed), ask(rng, "flag", country)]
        rng.shuffle(turns)
        return turns

    return picture, rounds(draw, world.rounds)


WITHOUT_ARTICLE = ("glasses", "headphones", "lightning", "pants", "scissors")


def sketch(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """One sketch, with a dark pen on light paper or the other way round."""
    kinds = list(world.sketches)
    kind = rng.choice(kinds)
    colour = rng.choice(["black", "black", "black", "blue", "red", "green", "purple", "brown", "white"])
    picture = background(rng, set(COLOURS) - ({"black", "blue"} if colour == "white" else {"white", "yellow"}))
    add_sketch(picture, rng.choice(world.sketches[kind]), kind, colour, rng)

    def draw() -> list[Turn]:
        claim = kind if rng.random() < 0.5 else rng.choice([k for k in kinds if k != kind])
        closed = [ask(rng, "sketch choice", kind, options=options(rng, kind, kinds))]
        if claim not in WITHOUT_ARTICLE:
            closed.append(ask(rng, "is sketch", yes_no(claim == kind), a_claim=article(claim)))
        turns = [*picked(world, rng, closed), ask(rng, "sketch", kind)]
        rng.shuffle(turns)
        return turns

    return picture, rounds(draw, world.rounds)


def emoji(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """One emoji, two side by side, or a few of a kind; held-out pictures show one."""
    kind = rng.choice(world.emoji_words)
    picture = background(rng, set())
    form = 0.0 if world.held_out else rng.random()
    picture.background = picture.background if form < 0.2 else None
    if form < 0.65:
        side = rng.uniform(120, 240)
        xy = (rng.uniform(side / 2 - 6, CANVAS - side / 2 + 6), rng.uniform(side / 2 - 6, CANVAS - side / 2 + 6))
        add_emoji(picture, rng.choice(world.emoji[kind]), kind, xy, side, rng)

        def draw() -> list[Turn]:
            closed = list(thing_turns(rng, kind, "one", world.emoji_words, "emoji"))
            last = closed.pop()
            return [last] if rng.random() < 0.5 else [*picked(world, rng, closed), last]

        turns = rounds(draw, world.rounds)
        if not world.held_out:
            turns = [*side_turns(rng, "thing", *xy), *turns]
        if picture.background:
            turns.insert(0, Turn("What color is the background?", picture.background, "background"))
        return picture, turns
    if form < 0.85:
        other = rng.choice([w for w in world.emoji_words if w != kind])
        for name, x in ((kind, rng.uniform(60, 68)), (other, rng.uniform(188, 196))):
            spot = x, rng.uniform(70, 186)
            add_emoji(picture, rng.choice(world.emoji[name]), name, spot, rng.uniform(95, 125), rng)

        def draw_both() -> list[Turn]:
            claim = rng.choice([kind, other, rng.choice(world.emoji_words)])
            turns = [
                ask(rng, "emoji left", kind),
                ask(rng, "emoji right", other),
                ask(rng, "is it", yes_no(claim in (kind, other)), a_claim=article(claim)),
            ]
            rng.shuffle(turns)
            return turns

        return picture, rounds(draw_both, world.rounds)
    total = rng.randint(1, 4)
    chosen = rng.choice(world.emoji[kind])
    for spot in scatter(rng, total, 45):
        add_emoji(picture, chosen, kind, spot, rng.uniform(76, 92), rng)
    return picture, [
        ask(rng, "count of things", str(total)),
        ask(rng, "emoji" if total == 1 else "emoji of many", kind),
    ]


Maker = Callable[[World, Random], tuple[Any, list[Turn]]]
MAKERS: dict[str, Maker] = {
    "single": single, "pair": pair, "count": count, "number": number, "word": word, "emoji": emoji, "flag": flag,
    "sketch": sketch, "chart": chart, "two": two, "video": video,
}  # fmt: skip
"""Skill → what draws it: one `Picture` (a list of them for `two` and `video`) and the questions about it."""
SINGLE_PICTURE = {
    "single": 0.05, "pair": 0.07, "count": 0.14, "number": 0.07, "word": 0.35, "emoji": 0.10, "flag": 0.03,
    "sketch": 0.07, "chart": 0.12,
}  # fmt: skip
"""The mixture of the warm-up: what is one picture. Letters are the most work for a tower."""
MIXTURE = {
    "single": 0.05, "pair": 0.07, "count": 0.13, "number": 0.04, "word": 0.24, "emoji": 0.08, "flag": 0.03,
    "sketch": 0.05, "chart": 0.26, "two": 0.03, "video": 0.02,
}  # fmt: skip
"""The mixture of conversations."""
LESSONS = {
    "single": 0.15, "pair": 0.15, "count": 0.15, "number": 0.03, "word": 0.10, "emoji": 0.05, "flag": 0.05,
    "sketch": 0.03, "chart": 0.18, "two": 0.08, "video": 0.03,
}  # fmt: skip
"""The mixture while the text model is blindfold: rich in questions for yes or no, which come last and need most."""
_KIND_INDEX = {name: index for index, name in enumerate(KINDS)}


def make(
    world: World,
    seed: int,
    skill: str | None = None,
    strength: float = 1.0,
    mixture: dict[str, float] = MIXTURE,
    pixels: bool = True,
) -> Sample:
    """The sample of this seed; the skill is drawn from the mixture unless named. Without `pixels` these are empty."""
    rng = Random(seed)
    skill = skill or rng.choices(list(mixture), list(mixture.values()))[0]
    made, turns = MAKERS[skill](world, rng)
    pictures: list[Picture] = made if isinstance(made, list) else [made]
    targets = np.stack([picture.targets(_KIND_INDEX) for picture in pictures])
    if not pixels:
        return Sample(skill, np.empty((0, 0, 0, 3), np.uint8), turns, targets)
    states = [rng.getrandbits(32) for _ in pictures]
    if skill == "video":  # a camera changes light and noise for all frames alike
        states = states[:1] * len(pictures)
    drawn = [finish(picture, Random(state), strength) for picture, state in zip(pictures, states, strict=True)]
    return Sample(skill, np.stack(drawn), turns, targets)
