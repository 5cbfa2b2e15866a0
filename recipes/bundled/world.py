"""What one side of the split draws with: fonts, words, emoji art, flags, sketches, and pairs of shape and colour."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

import art
from draw import CANVAS, CHARACTERS, COLOURS, SHAPES
from sources import HELD_OUT_ICONS, TRAIN_ICONS

CHART_PARTS = ("bar", "slice", "line")
KINDS = tuple(
    dict.fromkeys(("background", *SHAPES, *art.EMOJI, *CHARACTERS, *art.COUNTRIES, *art.SKETCHES, *CHART_PARTS))
)
"""Names of the dense targets: what a patch can show."""

COMBOS_HELD_OUT = {(shape, COLOURS[(3 * i + 1) % 11]) for i, shape in enumerate(SHAPES)}
"""One colour of every shape that no training picture shows it in."""

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
FONT_STYLES_LEFT_OUT = ("italic", "oblique", "thin", "hairline", "light", "symbol", "smcp", "-it", "sc.", "outline",
                        "inline", "shadow", "initials", "titl", "emoji", "keyboard", "variable", "[wght", "2-", "bi.",
                        "ri.", "_i", "bolditalic", "libertinelogo", "rz", "sansita", "math")  # fmt: skip


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
    flags: dict[str, list[np.ndarray]] = field(default_factory=dict)
    sketches: dict[str, np.ndarray] = field(default_factory=dict)
    banned: frozenset[str] = frozenset()
    """Words of the other side, which letters drawn at random may not spell."""

    @classmethod
    def load(cls, work: Path, held_out: bool, icon_sets: list[str] | None = None) -> World:
        """What `sources.py`, `art.py` and `cut_tokenizer.py` left in the work folder."""
        side = "held_out" if held_out else "train"
        index = work / f"fonts_{side}.json"
        if not index.exists():
            index.write_text(json.dumps([str(path) for path in usable_fonts(work / "fonts" / side)], indent=0))
        every = json.loads((work / "words.json").read_text())
        words, banned = every[side], frozenset(every["train" if held_out else "held_out"])
        emoji = art.classes(work, icon_sets or list(HELD_OUT_ICONS if held_out else TRAIN_ICONS))
        return cls(
            held_out, json.loads(index.read_text()), words, {name: p for name, p in emoji.items() if p},
            art.load_flags(work, held_out), art.load_sketches(work, held_out), banned,
        )  # fmt: skip

    @property
    def rounds(self) -> int:
        """How often questions are drawn about a picture: in training several times, because they share its tokens."""
        return 1 if self.held_out else 4

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
