"""How an engine's cost grows: seconds for 1…50 tiles, for video frames, for tokens of a prompt; a plot of the three.

Run through ``engine.py --cost-plot docs/cost.svg``. Points of up to two
seconds are the median of three; the line through each panel is
the least-squares one through its points.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_workers import Ours, timed

TILES = (1, 3, 9, 17, 50)
FRAMES = (1, 4, 8, 16)
TOKENS = (64, 256, 512, 1128, 2048, 4096)
PANELS = (("tiles", "tiles of a picture"), ("frames", "video frames"), ("tokens", "tokens of a prompt"))


def measure(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(amount, seconds) by kind. Frames go through the checkpoint's video processor, tiles and tokens do not."""
    ours = Ours(folder, None, None)
    tower, video = ours.backend.tower, ours.vlm.processor.video_processor
    side = ours.vlm.model.config.vision.image_size

    def tiles(count: int) -> None:
        with ours.torch.inference_mode():
            tower(ours.tile.expand(count, -1, -1, -1))

    def frames(count: int) -> None:
        import numpy as np

        clip = np.full((count, side, side, 3), 90, dtype=np.uint8)
        pixels = video(videos=[clip], do_sample_frames=False, return_tensors="pt")["pixel_values"]
        with ours.torch.inference_mode():
            tower(pixels.flatten(0, 1))

    tiles(1)  # warm, like the two calls below
    frames(1)
    ours.prefill(64)
    return {
        "tiles": _points(TILES, lambda n: timed(lambda: tiles(n))),
        "frames": _points(FRAMES, lambda n: timed(lambda: frames(n))),
        "tokens": _points(TOKENS, lambda n: ours.prefill(n)),
    }


def _points(amounts: Sequence[int], seconds: Callable[[int], float]) -> list[tuple[int, float]]:
    points = []
    for amount in amounts:
        found = [seconds(amount)]
        found += [seconds(amount) for _ in range(2 if found[0] < 2 else 0)]
        points.append((amount, statistics.median(found)))
    return points


def line(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Seconds for each one more and for none, and the largest distance of a point from that line, as a share of it."""
    slope, start = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    worst = max(abs(y - start - slope * x) / y for x, y in points)
    return {"seconds_each": slope, "seconds_start": start, "worst_share": worst}


def draw(measured: dict[str, list[tuple[int, float]]], target: Path, caption: str) -> None:
    """An SVG of three panels."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 330" font-family="sans-serif" font-size="13">',
        '<rect width="960" height="330" fill="white"/>',
    ]
    for number, (name, label) in enumerate(PANELS):
        parts += _panel(measured[name], label, 50 + number * 310)
    parts += [f'<text x="480" y="322" text-anchor="middle" fill="#555">{caption}</text>', "</svg>"]
    target.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _panel(points: Sequence[tuple[int, float]], label: str, left: int) -> list[str]:
    width, height, top = 240, 220, 30
    right, most = max(x for x, _ in points), 1.1 * max(y for _, y in points)
    fit = line(points)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * x / right, top + height * (1 - y / most)

    (x0, y0), (x1, y1) = (place(x, fit["seconds_start"] + fit["seconds_each"] * x) for x in (0, right))
    bottom = top + height
    shapes = [
        f'<path d="M{left} {top}V{bottom}H{left + width}" fill="none" stroke="#333"/>',
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#b44" stroke-dasharray="5 4"/>',
        f'<text x="{left + width / 2}" y="{bottom + 36}" text-anchor="middle">{label}</text>',
        f'<text x="{left + 6}" y="{top + 6}">{1e3 * fit["seconds_each"]:.3g} ms each</text>',
    ]
    for x, y in points:
        across, down = place(x, y)
        shapes.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="#246"/>')
    for share in (0.0, 0.5, 1.0):
        shapes.append(
            f'<text x="{left + width * share}" y="{bottom + 16}" text-anchor="middle">{round(right * share)}</text>'
        )
        shapes.append(f'<text x="{left - 6}" y="{place(0, most * share)[1] + 4:.1f}" text-anchor="end">'
                      f"{most * share:.2g} s</text>")  # fmt: skip
    return shapes


def report(folder: Path, target: Path, caption: str) -> dict[str, Any]:
    """Measure, draw, and say what was found."""
    measured = measure(folder)
    draw(measured, target, caption)
    return {name: {"points": points, **line(points)} for name, points in measured.items()}
