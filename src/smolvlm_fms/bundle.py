"""What ships inside the package: the model ``demo`` and its pictures."""

from __future__ import annotations

from pathlib import Path

from smolvlm_fms.errors import FetchError

__all__ = ["ASSETS", "bundled", "folder_of"]

ASSETS = Path(__file__).parent / "assets"


def bundled(name: str = "demo") -> Path:
    """Return the folder of a bundled model (``demo``) or of the bundled ``pictures``; raises FetchError."""
    folder = ASSETS / name
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in ASSETS.iterdir() if p.is_dir())) if ASSETS.is_dir() else "nothing"
        raise FetchError(f"Nothing called {name!r} is bundled; there is: {there}.")
    return folder


def folder_of(model: str | Path) -> str | Path:
    """``"demo"`` to its bundled folder; any other name, folder or hub id is returned as it is."""
    return bundled("demo") if model == "demo" and not Path("demo").is_dir() else model
