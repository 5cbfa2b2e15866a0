"""Draw the pictures that ship beside the bundled model, from the held-out side of the split.

For each skill the first seeds whose questions the checkpoint answers are kept: they show what it can do; how often it
can is what `RESULTS.json` says. Writes 256×256 PNGs and `questions.json` (the list that `smolvlm demo` asks).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch
from PIL import Image
from smolvlm_fms.fms_bridge.loading import load_model

import skills
from conversations import Writer
from held_out import right
from sources import DEFAULT_WORK

WANTED = {
    "single": ("shape", "colour", "size", "place"),
    "pair": ("side colour", "bigger", "relation"),
    "count": ("count", "count of kind"),
    "number": ("digits",),
    "word": ("words",),
    "emoji": ("emoji",),
}
EACH = {"single": 2, "pair": 1, "count": 1, "number": 1, "word": 1, "emoji": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--model", type=Path, default=Path("src/smolvlm_fms/assets/demo"))
    parser.add_argument("--out", type=Path, default=Path("src/smolvlm_fms/assets/pictures"))
    args = parser.parse_args()
    model, writer = load_model(args.model, dtype=torch.float32), Writer(args.work)
    world = skills.World.load(args.work, held_out=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.png"):
        old.unlink()
    table: list[dict[str, object]] = []
    for skill, number in EACH.items():
        kept, seed = 0, 70_000
        while kept < number:
            seed += 1
            picture, turns = skills.MAKERS[skill](world, Random(seed))
            asked = [turn for turn in turns if turn.about in WANTED[skill]]
            small = picture.image.resize((128, 128), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(1, 128, 128, 3)
            if len(asked) < min(2, len(WANTED[skill])):
                continue
            if not all(right(model, writer, pixels.expand(len(asked), -1, -1, -1), asked)):
                continue
            kept += 1
            name = f"{skill}-{kept}.png" if number > 1 else f"{skill}.png"
            picture.image.save(args.out / name, optimize=True)
            for turn in asked[:2]:
                table.append({"images": [name], "question": turn.question, "answers": [turn.answer]})
            print(name, seed, *asked, sep="\n   ")
    (args.out / "questions.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
