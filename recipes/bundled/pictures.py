"""Draw the pictures that ship beside the bundled model, from the held-out side of the split.

For each skill the first seeds whose questions the checkpoint answers are kept: they show what it can do; how often it
can is what `RESULTS.json` says. Writes 256×256 PNGs and `questions.json` (the list that `smolvlm demo` asks).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import smolvlm_fms as sv
from smolvlm_fms.cli.demo import ask

import skills
from draw import Picture
from sources import DEFAULT_WORK
from wordings import Turn

WANTED = {
    "single": ("shape", "colour", "size", "place"),
    "pair": ("side colour", "bigger", "relation"),
    "count": ("count", "count of kind"),
    "number": ("digits",),
    "word": ("words",),
    "emoji": ("emoji",),
    "flag": ("flag", "flag choice"),
    "sketch": ("sketch",),
    "chart": ("tallest colour", "count of bars", "biggest slice", "value of colour", "chart kind"),
    "two": ("same shape", "picture of more", "picture of bigger", "thing in picture"),
    "video": ("direction",),
}
EACH = {"single": 2, "pair": 1, "count": 1, "number": 1, "word": 1, "emoji": 4, "flag": 1, "sketch": 1, "chart": 1,
        "two": 1, "video": 1}  # fmt: skip
TRIES = 60
"""Seeds a skill: one that fails on all of them is left out."""


def questions(pictures: list[Picture], turns: list[Turn], skill: str, folder: Path, name: str) -> list[dict[str, Any]]:
    """Entries of `questions.json` for these pictures, which are written into the folder."""
    asked = [turn for turn in turns if turn.about in WANTED[skill]][:2]
    names = [f"{name}-{index}.png" if len(pictures) > 1 else f"{name}.png" for index in range(1, len(pictures) + 1)]
    for file, picture in zip(names, pictures, strict=True):
        picture.image.save(folder / file, optimize=True)
    kind = {"video": True} if skill == "video" else {}
    return [{"images": names, "question": t.question, "answers": [t.answer], **kind} for t in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--model", type=Path, default=Path("src/smolvlm_fms/assets/demo"))
    parser.add_argument("--out", type=Path, default=Path("src/smolvlm_fms/assets/pictures"))
    args = parser.parse_args()
    vlm = sv.load(str(args.model))
    world = skills.World.load(args.work, held_out=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.png"):
        old.unlink()
    table: list[dict[str, Any]] = []
    for skill, number in EACH.items():
        kept = 0
        for seed in range(70_000, 70_000 + TRIES):
            made, turns = skills.MAKERS[skill](world, Random(seed))
            name = f"{skill}-{kept + 1}" if number > 1 else skill
            asked = questions(made if isinstance(made, list) else [made], turns, skill, args.out, name)
            if asked and all(ask(vlm, args.out, one)[1] for one in asked):
                kept += 1
                table += asked
                print(name, seed, [(one["question"], one["answers"]) for one in asked], flush=True)
            if kept == number:
                break
        else:
            print(f"{skill}: {kept} of {number} found", flush=True)
    used = {name for one in table for name in one["images"]}
    for file in args.out.glob("*.png"):
        if file.name not in used:
            file.unlink()
    (args.out / "questions.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
