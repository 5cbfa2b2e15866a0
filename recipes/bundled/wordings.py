"""How questions are put: several wordings of each, by what they are about."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Turn(NamedTuple):
    """A question, its answer, and what it is about (a key of `WORDINGS`)."""

    question: str
    answer: str
    about: str


WORDINGS: dict[str, tuple[str, ...]] = {
    "is it": ("Is this {a_claim}?", "Is there {a_claim} in the picture?", "Do you see {a_claim}?"),
    "choice": ("Which {noun} is it: {options}?", "Is this {options}?"),
    "shape": ("What shape is this?", "What shape is it?", "Which shape do you see?", "What is the shape?"),
    "colour": (
        "What color is the {shape}?",
        "What color is the shape?",
        "What color is it?",
        "Which color does the {shape} have?",
    ),
    "is colour": ("Is the {shape} {claim}?", "Is the shape {claim}?"),
    "size": (
        "Is the {shape} big or small?",
        "Is the shape big or small?",
        "How big is the shape, big or small?",
    ),
    "place": ("Where is the {shape}?", "Where is the shape?", "In which part of the picture is the {shape}?"),
    "left or right": ("Is the {shape} on the left or on the right?", "Is it on the left or on the right?"),
    "top or bottom": ("Is the {shape} at the top or at the bottom?", "Is it at the top or at the bottom?"),
    "background": ("What color is the background?", "Which color is behind the shape?"),
    "description": ("Describe the picture.", "What do you see?", "What is in the picture?"),
    "colour of": ("What color is the {shape}?", "Which color does the {shape} have?"),
    "shape of": ("Which shape is {colour}?", "What shape is {colour}?"),
    "side": ("What is on the {side}?", "Which shape is on the {side}?"),
    "side colour": ("What color is the shape on the {side}?",),
    "relation": ("Is the {shape} {relation} the {other}?",),
    "bigger": (
        "Which shape is bigger?",
        "Which is bigger, the {shape} or the {other}?",
        "Which is bigger, the {other} or the {shape}?",
    ),
    "where of two": ("Where is the {shape}, {near} or {far}?",),
    "is there": ("Is there {a_claim}?",),
    "count": ("How many shapes are there?", "How many shapes do you see?", "Count the shapes."),
    "count of kind": ("How many {plural} are there?", "How many {plural} do you see?"),
    "count of colour": ("How many {colour} shapes are there?",),
    "colour of all": ("What color are the shapes?",),
    "shape of all": ("What shapes are these?",),
    "digits": ("What number is this?", "Which number do you see?", "Read the number."),
    "words": ("What does it say?", "Read the word.", "What is written here?", "What word is this?"),
    "first of": ("What is the first {sign}?",),
    "last of": ("What is the last {sign}?",),
    "length": ("How many {sign}s are there?", "How many {sign}s do you see?"),
    "ink": ("What color is the {written}?", "What color is the writing?"),
    "emoji": (
        "What is this?",
        "What is it?",
        "What do you see?",
        "What is in the picture?",
        "What does the picture show?",
    ),
    "emoji left": ("What is on the left?",),
    "emoji right": ("What is on the right?",),
    "count of things": ("How many things are there?",),
    "emoji of many": ("What are these?",),
    "lines": ("What does it say?", "Read the words.", "What is written here?"),
    "flag": ("Which country's flag is this?", "What country is this flag from?", "Whose flag is this?"),
    "is flag": ("Is this the flag of {claim}?",),
    "flag choice": ("Which flag is it: {options}?", "Is this the flag of {options}?"),
    "sketch": ("What is drawn here?", "What is this a sketch of?", "What does the drawing show?"),
    "is sketch": ("Is this a drawing of {a_claim}?", "Is this {a_claim}?"),
    "sketch choice": ("What is drawn here: {options}?", "Which one is it: {options}?"),
    "chart kind": ("What kind of chart is this?",),
    "chart choice": ("Is this a {options}?",),
    "count of bars": ("How many bars are there?", "How many bars does the chart have?"),
    "tallest colour": ("What color is the tallest bar?", "Which color is the highest bar?"),
    "shortest colour": ("What color is the shortest bar?", "Which color is the lowest bar?"),
    "tallest letter": ("Which bar is the tallest?", "Which letter has the highest bar?"),
    "shortest letter": ("Which bar is the shortest?", "Which letter has the lowest bar?"),
    "taller": ("Is the {shape} bar taller than the {other} bar?",),
    "value of letter": ("What is the value of {letter}?", "What is the value of bar {letter}?"),
    "value of colour": ("What is the value of the {colour} bar?",),
    "count of slices": ("How many slices are there?", "How many slices does the pie have?"),
    "biggest slice": ("What color is the biggest slice?", "Which color is the largest slice?"),
    "smallest slice": ("What color is the smallest slice?",),
    "bigger slice": ("Is the {shape} slice bigger than the {other} slice?",),
    "line direction": ("Does the line go up or down?", "Does the line rise or fall, up or down?"),
    "line colour": ("What color is the line?",),
    "same shape": ("Do both pictures show the same shape?", "Is it the same shape in both pictures?"),
    "same colour": ("Do the shapes have the same color?", "Is the color the same in both pictures?"),
    "same thing": ("Do both pictures show the same thing?", "Is it the same thing in both pictures?"),
    "picture of bigger": ("Which picture has the bigger shape, the first or the second?",),
    "picture of more": ("Which picture has more shapes, the first or the second?",),
    "picture of fewer": ("Which picture has fewer shapes, the first or the second?",),
    "picture with": ("Which picture shows {a_claim}, the first or the second?",),
    "shape in picture": ("What shape is in the {which} picture?",),
    "colour in picture": ("What color is the shape in the {which} picture?",),
    "count in picture": ("How many shapes are in the {which} picture?",),
    "thing in picture": ("What is in the {which} picture?",),
    "direction": ("Which way does the {shape} move?", "Where does the {shape} go?"),
    "is direction": ("Does the {shape} move {claim}?",),
    "moves": ("What moves?", "What is moving in the video?"),
    "stays": ("What stays where it is?",),
    "grows": ("Does the {shape} get bigger or smaller?",),
    "thing in video": ("What is in the video?",),
}


def ask(rng: Random, about: str, answer: str, **words: str) -> Turn:
    """One of the wordings, filled in."""
    return Turn(rng.choice(WORDINGS[about]).format(**words), answer, about)


def rounds(draw: Callable[[], list[Turn]], times: int, most: int = 12) -> list[Turn]:
    """The turns of so many draws, each question once."""
    found: dict[str, Turn] = {}
    for _ in range(times):
        for turn in draw():
            found.setdefault(turn.question, turn)
    return list(found.values())[:most]


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def options(rng: Random, answer: str, pool: list[str], count: int = 3) -> str:
    """The answer among others, in any order: "dog, cat or bee"."""
    picked = [answer, *rng.sample([other for other in pool if other != answer], count - 1)]
    rng.shuffle(picked)
    return ", ".join(picked[:-1]) + " or " + picked[-1]
