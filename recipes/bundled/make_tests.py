"""Build the held-out tests that ship with the package: `src/smolvlm_fms/assets/eval/<name>.zip`.

python recipes/bundled/make_tests.py          # after sources.py, art.py and cut_tokenizer.py

Everything in them comes from the held-out side of the recipe's split: pairs of shape and colour, words, fonts, icon
sets, drawings. Charts are drawn by matplotlib, which no training picture is. Each line says what it was made of. The
seeds are texts, training's are numbers, so no test repeats a training picture's draw. The same sources give the same
files, byte for byte.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

import plots
import skills
from draw import CANVAS, COLOURS, Picture, background, rgb
from sources import DEFAULT_WORK, HELD_OUT_FONTS
from wordings import Turn, ask
from world import World

OUT = Path("src/smolvlm_fms/assets/eval")
ICONS = ["fluent-emoji"]
LIBS = ("matplotlib==3.11.2", "contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0", "kiwisolver==1.5.1",
        "pyparsing==3.3.3", "python-dateutil==4.0.0", "six==1.17.0", "packaging==26.3")  # fmt: skip
LONGEST_READING = 6
"""Words."""
SHORTEST_WORD = 4
"""Letters. Shorter ones, drawn as random letters, may have been trained on before the generator banned them."""
SIDE, SIDE_OF_SEVERAL = 256, 160
"""Pixels of a picture's side: alone, or one of several."""


@dataclass
class Question:
    """One line of a test: canvases of 256×256 in their order, and the turn that is asked about them."""

    pictures: list[Image.Image]
    turn: Turn
    kind: str = ""
    source: dict[str, Any] = field(default_factory=dict)


Builder = Callable[[World, Path], Iterator[Question]]


def emoji(world: World, work: Path, each: int = 3) -> Iterator[Question]:
    """Every emoji of the recipe in art never trained on, untouched, at some size and place, asked openly."""
    del work
    for name, pictures in world.emoji.items():
        for number in range(each):
            rng = Random(f"eval emoji {name} {number}")
            image = Image.fromarray(pictures[number % len(pictures)])
            yield Question(
                [placed(image, rng, rng.uniform(130, 236))], ask(rng, "emoji", name), source={"set": ICONS[0]}
            )


def flags(world: World, work: Path, each: int = 5) -> Iterator[Question]:
    """Every flag of the held-out set."""
    del work
    for country, pictures in world.flags.items():
        for number in range(each if pictures else 0):
            rng = Random(f"eval flag {country} {number}")
            image = Image.fromarray(pictures[number % len(pictures)])
            yield Question(
                [placed(image, rng, rng.uniform(140, 236))], ask(rng, "flag", country), source={"set": "twemoji"}
            )


def sketches(world: World, work: Path, each: int = 6) -> Iterator[Question]:
    """Held-out drawings of every sort, with a dark pen on light paper."""
    del work
    for name, drawings in world.sketches.items():
        chosen = Random(f"eval sketches {name}").sample(range(len(drawings)), each)
        for number in chosen:
            rng = Random(f"eval sketch {name} {number}")
            yield Question([pen_drawing(drawings[number], rng)], ask(rng, "sketch", name), source={"drawing": number})


def placed(image: Image.Image, rng: Random, width: float) -> Image.Image:
    """An RGBA picture, as it is, somewhere on one of the recipe's backgrounds."""
    picture = background(rng, set())
    image = image.resize((round(width), min(248, round(width * image.height / image.width))), Image.Resampling.LANCZOS)
    corner = [round(rng.uniform(4, CANVAS - side - 4)) for side in image.size]
    picture.image.paste(image.convert("RGB"), (corner[0], corner[1]), image.getchannel("A"))
    return picture.image


def pen_drawing(ink: np.ndarray, rng: Random) -> Image.Image:
    """A drawing (28, 28) uint8, enlarged to a smooth stroke."""
    picture = background(rng, set(COLOURS) - {"white", "yellow"})
    image = Image.fromarray(ink)
    image = image.crop(image.getbbox())
    scale = rng.uniform(140, 225) / max(image.size)
    image = image.resize([max(16, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    mask = image.point([min(255, max(0, round((level - 80) * 4))) for level in range(256)])
    corner = [round(rng.uniform(4, CANVAS - side - 4)) for side in mask.size]
    picture.image.paste(rgb(rng.choice(["black", "black", "blue"]), rng), (corner[0], corner[1]), mask)
    return picture.image


SHAPES: dict[str, tuple[str, set[str]]] = {
    "shape": ("single", {"shape", "choice", "is it"}),
    "colour": ("single", {"colour", "is colour"}),
    "size": ("single", {"size"}),
    "place": ("single", {"place"}),
    "relation": ("pair", {"relation"}),
    "side": ("pair", {"side", "side colour", "where of two"}),
    "bigger": ("pair", {"bigger"}),
    "count": ("count", {"count", "count of kind", "count of colour"}),
}
PAIRS: dict[str, tuple[str, set[str]]] = {
    "same or not": ("two", {"same shape", "same colour", "same thing"}),
    "which picture": ("two", {"picture of bigger", "picture of more", "picture of fewer", "picture with"}),
    "what is in it": ("two", {"shape in picture", "colour in picture", "count in picture", "thing in picture"}),
}
VIDEOS: dict[str, tuple[str, set[str]]] = {
    "direction": ("video", {"direction"}),
    "yes or no": ("video", {"is direction"}),
    "what": ("video", {"moves", "stays", "thing in video"}),
    "size": ("video", {"grows"}),
}
"""Sort of question → the generator's skill, and what its turns are about."""


def generated(kinds: dict[str, tuple[str, set[str]]], each: int) -> Builder:
    """Questions of the recipe's own generators, on what they never drew in training; as many of each sort."""

    def build(world: World, work: Path) -> Iterator[Question]:
        del work
        for kind, (skill, about) in kinds.items():
            rng, found = Random(f"eval {skill} {kind}"), 0
            while found < each:
                seed = rng.getrandbits(64)
                made, turns = skills.MAKERS[skill](world, Random(f"eval {skill} {seed}"))
                asked = [turn for turn in turns if turn.about in about]
                if asked:
                    found += 1
                    pictures: list[Picture] = made if isinstance(made, list) else [made]
                    yield Question([p.image for p in pictures], rng.choice(asked), kind, {"seed": seed})

    return build


READING = {"number": 70, "one word": 90, "two words": 50, "three to six": 30}


def reading(world: World, work: Path) -> Iterator[Question]:
    """Numbers of one to three digits and one to six held-out words, in capitals, in held-out fonts."""
    del work
    words = [word.upper() for word in world.words if len(word) >= SHORTEST_WORD]
    for kind, number in READING.items():
        for index in range(number):
            rng = Random(f"eval reading {kind} {index}")
            face = rng.choice(world.fonts)
            alone = World(True, [face], world.words, {})
            if kind == "number":
                digits = rng.choice([1, 2, 2, 3, 3])
                text = str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))
            else:
                count = {"one word": 1, "two words": 2}.get(kind) or rng.randint(3, LONGEST_READING)
                text = " ".join(rng.sample(words, count))
            picture, turns = skills.written(alone, rng, text, "digits" if kind == "number" else "words")
            (turn,) = (turn for turn in turns if turn.about in ("digits", "words", "lines"))
            yield Question([picture.image], turn, kind, {"font": font_source(face)})


def font_source(path: str) -> str:
    """Package and file of a font: `inter/Inter-Bold`."""
    parts = Path(path).parts
    package = next((part for part in parts if part in HELD_OUT_FONTS), "")
    return f"{package}/{Path(path).stem}"


def charts(world: World, work: Path) -> Iterator[Question]:
    """Bars, pies and lines in the light styles of matplotlib."""
    del world
    sys.path.insert(0, str(fetched_libs(work)))
    for kind, number in plots.KINDS.items():
        for index in range(number):
            rng = Random(f"eval charts {kind} {index}")
            image, turn, style = plots.chart(rng, kind)
            yield Question([image], turn, kind, {"style": style})


def fetched_libs(work: Path) -> Path:
    """matplotlib beside the environment, never in it."""
    libs = work / "test-libs"
    if not libs.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(libs), *LIBS]
        subprocess.run(command, check=True)
    return libs


@dataclass(frozen=True)
class Test:
    """How one test is built; `about` and `licence` are written into its first line."""

    build: Builder
    about: str
    licence: str
    metric: str = "exact"
    max_tokens: int = 16


OWN = "Apache-2.0 (drawn by this project)"
TESTS: dict[str, Test] = {
    "emoji_unseen_art": Test(emoji, "Fluent emoji, none of which was trained on", "MIT (Microsoft)"),
    "flags_unseen_set": Test(flags, "Twemoji's flags; other sets were trained on", "CC BY 4.0 (Twitter, contributors)"),
    "sketches": Test(sketches, "Quick, Draw! drawings that were not trained on", "CC BY 4.0 (Google)"),
    "shapes": Test(generated(SHAPES, 32), "pairs of shape and colour that were not trained on", OWN),
    "reading_unseen_fonts": Test(
        reading, "unseen words and numbers in unseen fonts", f"{OWN}; fonts OFL-1.1, Apache-2.0", "cer", 32
    ),
    "charts": Test(charts, "drawn by matplotlib, whose styles were not trained on", OWN),
    "two_pictures": Test(generated(PAIRS, 80), "unseen pairs of shape and colour, unseen emoji art", f"{OWN}; MIT"),
    "video": Test(generated(VIDEOS, 50), "three frames; unseen shapes and emoji art", f"{OWN}; MIT"),
}


def lines(test: Test, questions: list[Question], names: list[list[str]]) -> str:
    """The test's JSONL."""
    rows: list[dict[str, Any]] = [
        {"test": {"metric": test.metric, "max_tokens": test.max_tokens, "about": test.about, "licence": test.licence}}
    ]
    for one, files in zip(questions, names, strict=True):
        media = {"video": files} if test is TESTS["video"] else {"images": files}
        kind = {"kind": one.kind} if one.kind else {}
        rows.append({**media, "question": one.turn.question, "answer": one.turn.answer, **kind, "source": one.source})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def webp(image: Image.Image, side: int) -> bytes:
    """The smaller of lossless and nearly lossless, always encoded alike."""
    found = []
    if image.width > side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    for options in ({"lossless": True, "quality": 60, "method": 4}, {"quality": 80, "method": 6}):
        file = io.BytesIO()
        image.convert("RGB").save(file, "WEBP", **options)
        found.append(file.getvalue())
    return min(found, key=len)


def build(name: str, world: World, work: Path, out: Path) -> Path:
    """Write one test, its questions shuffled, so that the first of them are a fair sample."""
    test = TESTS[name]
    questions = list(test.build(world, work))
    Random(f"eval order {name}").shuffle(questions)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        names = []
        for number, one in enumerate(questions):
            several = len(one.pictures) > 1
            names.append([f"{number}-{i}.webp" if several else f"{number}.webp" for i in range(len(one.pictures))])
            for file, image in zip(names[-1], one.pictures, strict=True):
                content = webp(image, SIDE_OF_SEVERAL if several else SIDE)
                archive.writestr(zipfile.ZipInfo(file), content)  # of 1980: the same bytes each time
        archive.writestr(zipfile.ZipInfo(f"{name}.jsonl"), lines(test, questions, names), zipfile.ZIP_DEFLATED)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", help="one test's name")
    args = parser.parse_args()
    world = World.load(args.work, True, ICONS)
    seen = World.load(args.work, False)
    assert not set(world.words) & set(seen.words) and not set(world.fonts) & set(seen.fonts)
    for name in [args.only] if args.only else TESTS:
        path = build(name, world, args.work, args.out)
        print(name, f"{path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
