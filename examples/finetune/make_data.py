"""Draw dice, and write what is to be said about them: a small skill to teach.

    python examples/finetune/make_data.py FOLDER [--count 600]

FOLDER then holds pictures, ``train.jsonl`` and ``test.jsonl`` (one in six, other dice than in training).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

SPOTS = {1: [4], 2: [0, 8], 3: [0, 4, 8], 4: [0, 2, 6, 8], 5: [0, 2, 4, 6, 8], 6: [0, 2, 3, 5, 6, 8]}
WORDS = ["zero", "one", "two", "three", "four", "five", "six"]
QUESTION = "What does the die show?"


def die(number: int, draw: random.Random, side: int = 192) -> Image.Image:
    """A picture of a die: its colours, place, size and turn are drawn at random."""
    dark = draw.random() < 0.5
    body, dots = [tuple(draw.randint(*span) for _ in range(3)) for span in ((0, 90), (170, 255))][:: 1 if dark else -1]
    picture = Image.new("RGB", (side, side), tuple(draw.randint(60, 200) for _ in range(3)))
    size = draw.randint(side // 3, side // 2)
    face = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(face)
    pen.rounded_rectangle((0, 0, size - 1, size - 1), size // 6, fill=body)
    for spot in SPOTS[number]:
        x, y = ((1 + 2 * place) * size / 6 for place in (spot % 3, spot // 3))
        pen.ellipse((x - size / 11, y - size / 11, x + size / 11, y + size / 11), fill=dots)
    face = face.rotate(draw.uniform(0, 360), Image.Resampling.BICUBIC, expand=True)
    place = (draw.randint(0, side - face.width), draw.randint(0, side - face.height))
    picture.paste(face, place, face)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=600)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for index in range(args.count):
        draw = random.Random(index)
        number = draw.randint(1, 6)
        die(number, draw).save(args.folder / f"{index}.png")
        asked = [{"type": "image", "path": f"{index}.png"}, {"type": "text", "text": QUESTION}]
        answered = [{"type": "text", "text": WORDS[number]}]
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        lines["test" if index % 6 == 0 else "train"].append(json.dumps({"messages": talk}))
    for part, content in lines.items():
        (args.folder / f"{part}.jsonl").write_text("\n".join(content) + "\n", encoding="utf-8")
    print(f"{len(lines['train'])} conversations to learn from, {len(lines['test'])} to test with, in {args.folder}")


if __name__ == "__main__":
    main()
