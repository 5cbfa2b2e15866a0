"""Draw the learning curve of a training from its runs' metrics: `curve.svg` beside the model card.

python recipes/bundled/curve.py --warmup runs/warmup --text runs/text --run runs/bundled
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, GAP = 300, 190, 40, 34, 26
INK = ("#1f5fa8", "#c2571a", "#2e8540", "#7a3e9d", "#8a6d00", "#b01e4f", "#007a87", "#555555", "#d14b8f")
Line = tuple[str, Sequence[tuple[float, float]]]


def read(folder: Path) -> list[dict[str, object]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def smooth(points: Sequence[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Means over the last `span` points."""
    found = []
    for index in range(len(points)):
        recent = points[max(0, index - span + 1) : index + 1]
        found.append((points[index][0], sum(y for _, y in recent) / len(recent)))
    return found


def panel(title: str, lines: Sequence[Line], x0: float, top: float | None = None, unit: str = "pictures") -> str:
    """One diagram, its left edge at x0; x in thousands, y from 0."""
    most_x = max((x for _, points in lines for x, _ in points), default=1) or 1
    most_y = top or max((y for _, points in lines for _, y in points), default=1) or 1
    left, right, low, high = x0 + LEFT, x0 + LEFT + WIDTH, HEIGHT + 24, 24
    parts = [f'<text x="{left}" y="14" font-weight="bold">{title}</text>']
    for step in range(5):
        y = low - (low - high) * step / 4
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most_y * step / 4:.2g}</text>')
    for step in (0, 0.5, 1):
        x = left + WIDTH * step
        parts.append(f'<text x="{x}" y="{low + 16}" text-anchor="middle">{most_x * step / 1000:.0f}k</text>')
    parts.append(f'<text x="{right}" y="{low + 30}" text-anchor="end">{unit}</text>')
    for index, (name, points) in enumerate(lines):
        places = [(left + WIDTH * x / most_x, low - (low - high) * min(1.0, y / most_y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        ink = INK[index % len(INK)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.4"/>')
        if len(lines) > 1:
            parts.append(f'<text x="{right + 6}" y="{high + 8 + 14 * index}" fill="{ink}">{name}</text>')
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warmup", type=Path, default=Path("runs/warmup"))
    parser.add_argument("--text", type=Path, default=Path("runs/text"))
    parser.add_argument("--run", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--processes", type=int, default=2, help="of the last run: each logs its own samples")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curve.svg")
    args = parser.parse_args()
    warm = read(args.warmup)
    skills = list(dict.fromkeys(skill for one in warm for skill in one["right"]))  # type: ignore[attr-defined]
    seeing: list[Line] = [
        (s, smooth([(one["samples"], one["right"][s]) for one in warm if s in one["right"]], 6))  # type: ignore[misc,index,operator]
        for s in skills
    ]
    panels = [panel("Patches named rightly (tower alone)", seeing, 0, 1.0)]
    x = LEFT + WIDTH + 60 + GAP
    for title, folder, processes in (("Loss, told in symbols", args.text, 1), ("Loss, both", args.run, args.processes)):
        log, batch = read(folder), 0.0
        points = []
        for one in log:
            batch = float(one["samples"]) * processes  # type: ignore[arg-type]
            points.append((float(one["step"]) * batch, float(one["loss"])))  # type: ignore[arg-type]
        panels.append(panel(title, [("loss", smooth(points, 5))], x, unit="conversations"))
        x += LEFT + WIDTH + GAP
    args.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="{HEIGHT + 64}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(panels) + "\n</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
