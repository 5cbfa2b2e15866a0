"""Turn the icon sets into arrays: `<work>/art/<set>.npz` with RGBA pictures and the icons' names.

Run once after `sources.py`; about two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sources import DEFAULT_WORK, HELD_OUT_ICONS, TRAIN_ICONS

SIDE = 160
EMOJI: dict[str, list[str]] = json.loads((Path(__file__).parent / "emoji_names.json").read_text())


def rasterise(work: Path, icon_set: str, names: set[str] | None) -> tuple[list[str], np.ndarray]:
    """Names and RGBA pictures (N, 160, 160, 4) uint8 of one icon set; `names` limits it, None takes all."""
    sys.path.insert(0, str(work / "libs"))
    import resvg_py

    data = json.loads((work / "icons" / icon_set / "icons.json").read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    aliases = {k: v["parent"] for k, v in data.get("aliases", {}).items()}
    kept, pictures = [], []
    for name in sorted(set(data["icons"]) | set(aliases)) if names is None else sorted(names):
        icon = data["icons"].get(aliases.get(name, name))
        if icon is None or (names is None and "skin-tone" in name):
            continue
        w, h = icon.get("width", width), icon.get("height", height)
        left, top = icon.get("left", 0), icon.get("top", 0)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {w} {h}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
        pictures.append(np.asarray(Image.open(BytesIO(png)).convert("RGBA").resize((SIDE, SIDE))))
        kept.append(name)
    return kept, np.stack(pictures)


def load(work: Path, icon_set: str) -> dict[str, np.ndarray]:
    """Icon name → RGBA picture."""
    with np.load(work / "art" / f"{icon_set}.npz") as data:
        return dict(zip(data["names"].tolist(), data["pictures"], strict=True))


def classes(work: Path, icon_sets: list[str]) -> dict[str, list[np.ndarray]]:
    """Answer word → the pictures of it in these icon sets."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in EMOJI}
    for icon_set in icon_sets:
        pictures = load(work, icon_set)
        simple = {name.replace("-", ""): name for name in pictures}
        for word, icons in EMOJI.items():
            keys = [icon if icon in pictures else simple.get(icon.replace("-", "")) for icon in icons]
            found[word] += [pictures[key] for key in keys if key is not None]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    work = parser.parse_args().work
    (work / "art").mkdir(exist_ok=True)
    wanted = {icon for icons in EMOJI.values() for icon in icons}
    for icon_set in [*TRAIN_ICONS, *HELD_OUT_ICONS]:
        names, pictures = rasterise(work, icon_set, None if icon_set in ("noto", "twemoji", "fxemoji") else wanted)
        np.savez(work / "art" / f"{icon_set}.npz", names=np.array(names), pictures=pictures)
        print(icon_set, pictures.shape, flush=True)


if __name__ == "__main__":
    main()
