"""How an engine's cost grows: seconds for 1…50 tiles, for video frames, for tokens of a prompt; a plot of the three.

Run through ``engine.py --cost-plot docs/cost.svg``, all at once or a panel at a time. Points of up to two seconds are a
median of three. Each panel has the line of least squares of relative distances; tokens also have the parabola, because
every token looks at all that came before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engine_workers import Ours, timed

TILES = (1, 2, 5, 10, 17, 26, 50)
FRAMES = (1, 2, 4, 8, 16, 32)
TOKENS = (64, 256, 512, 1128, 2048, 4096, 8064)
PANELS = (("tiles", "tiles of a picture"), ("frames", "video frames"), ("tokens", "tokens of a prompt"))


def measure(folder: Path, panels: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(amount, seconds) by panel. Frames go through the checkpoint's video processor, tiles and tokens do not."""
    ours = Ours(folder, None, None)
    tower, video = ours.backend.tower, ours.vlm.processor.video_processor
    side = ours.vlm.model.config.vision.image_size

    def tiles(count: int) -> None:
        with ours.torch.inference_mode():
            tower(ours.tile.expand(count, -1, -1, -1))

    def frames(count: int) -> None:
        clip = np.full((count, side, side, 3), 90, dtype=np.uint8)
        pixels = video(videos=[clip], do_sample_frames=False, return_tensors="pt")["pixel_values"]
        with ours.torch.inference_mode():
            tower(pixels.flatten(0, 1))

    ways: dict[str, tuple[Sequence[int], Callable[[int], float]]] = {
        "tiles": (TILES, lambda count: timed(lambda: tiles(count))),
        "frames": (FRAMES, lambda count: timed(lambda: frames(count))),
        "tokens": (TOKENS, lambda count: _prefill(ours, count)),
    }
    for panel in panels:
        ways[panel][1](ways[panel][0][0])  # warm
    return {panel: _points(*ways[panel]) for panel in panels}


def _prefill(ours: Ours, tokens: int) -> float:
    """Seconds for a prompt in the chunks that the engine cuts it into."""
    sequence, chunk = ours._sequence(0, tokens, 1), ours.vlm.engine.config.prefill_chunk_alone

    def run() -> None:
        for start in range(0, tokens, chunk):
            ours.backend.prefill(sequence, start, min(chunk, tokens - start))

    return timed(run)


def _points(amounts: Sequence[int], seconds: Callable[[int], float]) -> list[tuple[int, float]]:
    points = []
    for amount in amounts:
        found = [seconds(amount)]
        found += [seconds(amount) for _ in range(2 if found[0] < 2 else 0)]
        points.append((amount, statistics.median(found)))
    return points


def fit(points: Sequence[tuple[int, float]], degree: int) -> dict[str, Any]:
    """The polynomial of least squares of relative distances: its coefficients, highest first, and the largest relative
    distance of a point."""
    x, y = np.array(points, dtype=np.float64).T
    coefficients = np.polyfit(x, y, degree, w=1 / y)
    return {
        "coefficients": coefficients.tolist(),
        "worst_share": float(np.abs(np.polyval(coefficients, x) / y - 1).max()),
    }


def draw(cost: dict[str, Any], target: Path, caption: str) -> None:
    """An SVG of as many panels as were measured."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 330" font-family="sans-serif" font-size="13">',
        '<rect width="960" height="330" fill="white"/>',
    ]
    for number, (name, label) in enumerate(PANELS):
        if name in cost:
            parts += _panel(cost[name], label, 50 + number * 310)
    parts += [f'<text x="480" y="322" text-anchor="middle" fill="#555">{caption}</text>', "</svg>"]
    target.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _panel(found: dict[str, Any], label: str, left: int) -> list[str]:
    width, height, top = 240, 220, 30
    points = found["points"]
    right, most = max(x for x, _ in points), 1.1 * max(y for _, y in points)

    def place(x: float, y: float) -> str:
        return f"{left + width * x / right:.1f},{top + height * (1 - y / most):.1f}"

    bottom, line = top + height, found["line"]
    told = f"{1e3 * line['coefficients'][0]:.3g} ms each, within {100 * line['worst_share']:.2g} %"
    shapes = [
        f'<path d="M{left} {top}V{bottom}H{left + width}" fill="none" stroke="#333"/>',
        f'<text x="{left + width / 2}" y="{bottom + 36}" text-anchor="middle">{label}</text>',
        f'<text x="{left + 8}" y="{top + 6}" fill="#b44">{told}</text>',
    ]
    for name, colour in (("parabola", "#474"), ("line", "#b44")):
        if name in found:
            way = [(x, float(np.polyval(found[name]["coefficients"], x))) for x in np.linspace(0, right, 41)]
            drawn = " ".join(place(x, y) for x, y in way if 0 <= y <= most)
            shapes.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-dasharray="5 4"/>')
    if "parabola" in found:
        told = f"with a square: within {100 * found['parabola']['worst_share']:.2g} %"
        shapes.append(f'<text x="{left + 8}" y="{top + 24}" fill="#474">{told}</text>')
    for x, y in points:
        across, down = place(x, y).split(",")
        shapes.append(f'<circle cx="{across}" cy="{down}" r="4" fill="#246"/>')
    for share in (0.0, 0.5, 1.0):
        shapes.append(
            f'<text x="{left + width * share}" y="{bottom + 16}" text-anchor="middle">{round(right * share)}</text>'
        )
        down = float(place(0, most * share).split(",")[1]) + 4
        shapes.append(f'<text x="{left - 6}" y="{down:.1f}" text-anchor="end">{most * share:.2g} s</text>')
    return shapes


def report(folder: Path, panels: Sequence[str]) -> dict[str, Any]:
    """Measure, and say what was found."""
    measured = measure(folder, panels)
    found: dict[str, Any] = {name: {"points": points, "line": fit(points, 1)} for name, points in measured.items()}
    if "tokens" in found:
        found["tokens"]["parabola"] = fit(measured["tokens"], 2)
    return found
