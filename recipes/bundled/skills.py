"""What the bundled model is taught: pictures with several questions each, the same for the same seed.

A `Sample` has a picture and turns (question, answer). Training draws from one side of every split, the held-out tests
from the other: pairs of shape and colour, fonts, words and the art of the emoji are never shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np

import art
from draw import CANVAS, CHARACTERS, COLOURS, SHAPES, Picture, add_emoji, add_shape, add_text, background, finish
from sources import HELD_OUT_ICONS, TRAIN_ICONS
from wordings import Turn, article, ask, options, plural, yes_no

KINDS = ("background", *SHAPES, *art.EMOJI, *CHARACTERS)
"""Names of the dense targets: what a patch can show."""

COMBOS_HELD_OUT = {(shape, COLOURS[(3 * i + 1) % 11]) for i, shape in enumerate(SHAPES)}
"""One colour of every shape that no training picture shows it in."""

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
FONT_STYLES_LEFT_OUT = ("italic", "oblique", "thin", "hairline", "light", "symbol", "smcp", "-it", "sc.", "outline",
                        "inline", "shadow", "initials", "titl", "emoji", "keyboard", "variable", "[wght", "2-", "bi.",
                        "ri.", "_i", "bolditalic", "libertinelogo", "rz", "sansita", "math")  # fmt: skip


@dataclass
class Sample:
    """`pixels` (128, 128, 3) uint8; `turns` questions and their answers; `kinds` and `colours` (64,) dense targets."""

    skill: str
    pixels: np.ndarray
    turns: list[Turn]
    kinds: np.ndarray
    colours: np.ndarray


def usable_fonts(folder: Path) -> list[Path]:
    """Upright text fonts with the characters that we write."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    plain = [p for p in found if "SC" not in p.stem and not any(s in p.name.lower() for s in FONT_STYLES_LEFT_OUT)]
    return [path for path in plain if _latin(path)]


def _latin(path: Path) -> bool:
    """Whether the font has every character that we write, as different drawings."""
    from PIL import ImageFont

    try:
        face = ImageFont.truetype(str(path), 40)
        drawn = {
            bytes(face.getmask(c)) + bytes(str(face.getbbox(c)), "ascii") for c in "ABCDEGHKMQRabdeghnqrt0123456789"
        }
        return len(drawn) == 31 and face.getlength("The") > 20
    except (OSError, ValueError):
        return False


@dataclass
class World:
    """Everything that one side of the split draws with: fonts, words, emoji art and pairs of shape and colour."""

    held_out: bool
    fonts: list[str]
    words: list[str]
    emoji: dict[str, list[np.ndarray]]

    @classmethod
    def load(cls, work: Path, held_out: bool, icon_sets: list[str] | None = None) -> World:
        """What `sources.py`, `art.py` and `cut_tokenizer.py` left in the work folder."""
        side = "held_out" if held_out else "train"
        index = work / f"fonts_{side}.json"
        if not index.exists():
            index.write_text(json.dumps([str(path) for path in usable_fonts(work / "fonts" / side)], indent=0))
        words = json.loads((work / "words.json").read_text())[side]
        emoji = art.classes(work, icon_sets or list(HELD_OUT_ICONS if held_out else TRAIN_ICONS))
        return cls(held_out, json.loads(index.read_text()), words, {name: p for name, p in emoji.items() if p})

    @property
    def emoji_words(self) -> list[str]:
        return list(self.emoji)

    def combo(
        self, rng: Random, shape: str | None = None, colour: str | None = None, avoid: set[str] = frozenset()
    ) -> tuple[str, str]:  # type: ignore[assignment]
        """A shape and a colour of this side of the split."""
        while True:
            pair = shape or rng.choice(SHAPES), colour or rng.choice(COLOURS)
            if pair[1] in avoid:
                continue
            if (pair in COMBOS_HELD_OUT) == self.held_out or (shape is not None and colour is not None):
                return pair


def place_of(x: float, y: float) -> str | None:
    """Name of the ninth of the canvas, None within a fuzzy margin between two."""
    cells = []
    for v in (x / CANVAS, y / CANVAS):
        if v < 0.34:
            cells.append(0)
        elif 0.42 < v < 0.58:
            cells.append(1)
        elif v > 0.66:
            cells.append(2)
        else:
            return None
    return PLACES[cells[1] * 3 + cells[0]]


def thing_turns(rng: Random, kind: str, noun: str, pool: list[str], about: str) -> tuple[Turn, Turn, Turn]:
    """A yes/no, a multiple-choice and an open question about the one thing in a picture."""
    claim = kind if rng.random() < 0.5 else rng.choice([p for p in pool if p != kind])
    return (
        ask(rng, "is it", yes_no(claim == kind), a_claim=article(claim)),
        ask(rng, "choice", kind, noun=noun, options=options(rng, kind, pool)),
        ask(rng, about, kind),
    )


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
    picture = background(rng, {colour})
    big = rng.random() < 0.4
    radius = rng.uniform(72, 112) if big else rng.uniform(24, 42)
    lowest, highest = radius * 0.95, CANVAS - radius * 0.95
    x, y = rng.uniform(lowest, highest), rng.uniform(lowest, highest)
    if not big and rng.random() < 0.5:
        x, y = (rng.choice([rng.uniform(28, 80), rng.uniform(112, 144), rng.uniform(176, 228)]) for _ in "xy")
    add_shape(picture, shape, colour, (x, y), radius, rng)
    size = "big" if big else "small"
    turns = [
        rng.choice(thing_turns(rng, shape, "shape", list(SHAPES), "shape")),
        ask(rng, "colour", colour, shape=shape),
        ask(rng, "size", size, shape=shape),
    ]
    if rng.random() < 0.4:
        claim = colour if rng.random() < 0.5 else rng.choice([c for c in COLOURS if c != colour])
        turns[1] = ask(rng, "is colour", yes_no(claim == colour), shape=shape, claim=claim)
    where = place_of(x, y)
    if where and not big:
        turns.append(ask(rng, "place", where, shape=shape))
    turns += side_turns(rng, shape, x, y)
    if picture.background and rng.random() < 0.5:
        turns.append(ask(rng, "background", picture.background))
    rng.shuffle(turns)
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
    turns = pair_turns(rng, first, second, sideways, 0 if radii[0] > radii[1] else 1)
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


def scatter(rng: Random, count: int, radius: float) -> list[tuple[float, float]]:
    """`count` centres at least 2.25 radii apart, fewer tries with smaller radii always succeed."""
    margin = radius * 1.08
    while True:
        spots: list[tuple[float, float]] = []
        for _ in range(60):
            spot = rng.uniform(margin, CANVAS - margin), rng.uniform(margin, CANVAS - margin)
            if all((spot[0] - x) ** 2 + (spot[1] - y) ** 2 > (2.25 * radius) ** 2 for x, y in spots):
                spots.append(spot)
                if len(spots) == count:
                    return spots
        radius *= 0.95


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
        add_shape(picture, kind, shade, spot, radius * rng.uniform(0.8, 1.0), rng)
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
    return picture, turns


# Two lists of colours too alike to write one on the other.
_TOO_NEAR = (
    {"black", "brown", "purple", "blue"},
    {"white", "yellow", "pink"},
    {"red", "orange", "brown"},
    {"gray", "green", "purple", "blue"},
)


def written(world: World, rng: Random, text: str, about: str) -> tuple[Picture, list[Turn]]:
    """A number or a word in large letters."""
    colour = rng.choice(COLOURS)
    avoid = {colour}.union(*(near for near in _TOO_NEAR if colour in near))
    if rng.random() < 0.4:
        colour, avoid = "black", set(COLOURS) - {"white", "yellow", "pink"}
    picture = background(rng, avoid)
    most = {1: 120, 2: 200, 3: 240}.get(len(text), 248)
    add_text(picture, text, rng.choice(world.fonts), colour, rng, rng.uniform(0.6, 1.0) * most)
    sign = "digit" if about == "digits" else "letter"
    turns = [
        ask(rng, about, text),
        ask(rng, "length", str(len(text)), sign=sign),
        *(
            [ask(rng, "first of", text[0], sign=sign), ask(rng, "last of", text[-1], sign=sign)]
            if len(text) > 1
            else []
        ),
    ]
    if rng.random() < 0.4:
        turns.append(ask(rng, "ink", colour, written="number" if about == "digits" else "text"))
    if rng.random() < 0.3 and picture.background:
        turns.append(Turn("What color is the background?", picture.background, "background"))
    rng.shuffle(turns)
    return picture, turns


def number(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """A number of one to three digits."""
    digits = rng.choice([1, 1, 2, 2, 3])
    text = str(rng.randint(0, 9)) if digits == 1 else str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    return written(world, rng, text, "digits")


def word(world: World, rng: Random) -> tuple[Picture, list[Turn]]:
    """A word of two to five letters; in training three in ten are letters drawn at random."""
    if world.held_out or rng.random() < 0.7:
        text = rng.choice(world.words)
        text = text.upper() if rng.random() < 0.7 else text
    else:
        text = "".join(rng.choice("ABCDEFGHIJKLMNOPRSTUVWYZ") for _ in range(rng.randint(1, 5)))
    return written(world, rng, text, "words")


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
        closed = list(thing_turns(rng, kind, "one", world.emoji_words, "emoji"))
        last = closed.pop()
        turns = [last] if rng.random() < 0.5 else [rng.choice(closed), last]
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
        claim = rng.choice([kind, other, rng.choice(world.emoji_words)])
        turns = [
            ask(rng, "emoji left", kind),
            ask(rng, "emoji right", other),
            ask(rng, "is it", yes_no(claim in (kind, other)), a_claim=article(claim)),
        ]
        rng.shuffle(turns)
        return picture, turns
    total = rng.randint(1, 4)
    chosen = rng.choice(world.emoji[kind])
    for spot in scatter(rng, total, 45):
        add_emoji(picture, chosen, kind, spot, rng.uniform(76, 92), rng)
    return picture, [
        ask(rng, "count of things", str(total)),
        ask(rng, "emoji" if total == 1 else "emoji of many", kind),
    ]


MAKERS: dict[str, Callable[[World, Random], tuple[Picture, list[Turn]]]] = {
    "single": single,
    "pair": pair,
    "count": count,
    "number": number,
    "word": word,
    "emoji": emoji,
}
MIXTURE = {"single": 0.16, "pair": 0.16, "count": 0.15, "number": 0.13, "word": 0.2, "emoji": 0.2}


@lru_cache(maxsize=1)
def _kind_index() -> dict[str, int]:
    return {name: index for index, name in enumerate(KINDS)}


def make(world: World, seed: int, skill: str | None = None, strength: float = 1.0) -> Sample:
    """The sample of this seed; the skill is drawn from the mixture unless named."""
    rng = Random(seed)
    skill = skill or rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    picture, turns = MAKERS[skill](world, rng)
    objects, owner = picture.patches()
    kinds = np.array([0] + [_kind_index()[kind] for kind, _ in objects[1:]], np.int64)[owner]
    shades = [COLOURS.index(c) if c else 255 for c in [picture.background, *[c for _, c in objects[1:]]]]
    return Sample(skill, finish(picture, rng, strength), turns, kinds, np.array(shades, np.int64)[owner])
