"""Put several runs of ``engine.py`` into one result, and hold its ratios against the bars.

    python benchmarks/peers/collect.py RUN.json… --out benchmarks/results/engine-2026-11-21-peers.json

A run is a file whose last line is the benchmark's JSON object. All peers at once take longer than some machines are
quiet for, so each may be measured in a run of its own; a ratio is always of figures from one run. When several runs
have the same ratio, the last one given counts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BARS: dict[str, tuple[float, float]] = {
    "tower_bf16_vs_transformers": (2.0, 2.3),
    "tower_bf16_vs_llamacpp": (3.0, 3.5),
    "tower_bf16_vs_openvino": (1.05, 1.15),
    "tower_int8_vs_llamacpp": (5.0, 7.0),
    "tower_int8_vs_ort": (1.5, 1.9),
    "tower_bf16_share_of_ceiling": (0.80, 0.92),
    "prefill_bf16_vs_transformers": (2.4, 2.9),
    "prefill_bf16_vs_llamacpp": (2.8, 3.3),
    "decode_bf16_short_vs_llamacpp": (1.3, 1.6),
    "decode_bf16_long_vs_llamacpp": (1.45, 2.0),
    "decode_int8_short_vs_llamacpp": (1.75, 2.3),
    "decode_int8_long_vs_llamacpp": (2.2, 2.8),
    "decode_int4_short_vs_llamacpp": (1.9, 2.4),
    "decode_int4_long_vs_llamacpp": (2.5, 3.3),
    "decode_batch8_vs_llamacpp": (2.0, 3.0),
    "fallback_tower_vs_transformers": (1.6, 1.6),
    "fallback_prefill_vs_transformers": (1.8, 1.8),
    "ttft_17_tiles_vs_llamacpp": (3.0, 5.0),
    "ttft_17_tiles_vs_transformers": (2.0, 3.5),
    "ttft_cached_speedup": (20.0, 50.0),
}
"""Ratio to what it must reach at least and what it aims at."""

COLD_START_BARS = (2.5, 1.5)
"""Seconds at most, and aimed at."""


def read_run(path: Path) -> dict[str, Any]:
    """The JSON object on the file's last line that is not empty."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; it should end in the benchmark's JSON object.")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def collect(runs: list[dict[str, Any]], note: str = "") -> dict[str, Any]:
    """One object with every run's figures, the ratios of all, and how each stands to its bars.

    ``note``: what a reader must know of the circumstances.
    """
    ratios: dict[str, float] = {}
    for run in runs:
        ratios.update(run["ratios"])
    starts = [run["cold_start_s"] for run in runs if run.get("cold_start_s") is not None]
    verdicts = {name: _verdict(ratios[name], *bars) for name, bars in BARS.items() if name in ratios}
    if starts:
        verdicts["cold_start_s"] = _verdict(-starts[-1], *(-bar for bar in COLD_START_BARS))
    return {
        **({"note": note} if note else {}),
        "ratios": ratios,
        "cold_start_s": starts[-1] if starts else None,
        "bars": {name: {"at_least": low, "aim": high} for name, (low, high) in BARS.items()},
        "verdicts": verdicts,
        "not_measured": [name for name in BARS if name not in ratios],
        "runs": runs,
    }


def _verdict(value: float, low: float, high: float) -> str:
    if value >= high:
        return "aim"
    return "held" if value >= low else "missed"


def table(result: dict[str, Any]) -> str:
    """The ratios beside their bars, as Markdown."""
    lines = ["| ratio | measured | at least | aim | |", "|---|---|---|---|---|"]
    for name, (low, high) in BARS.items():
        value = result["ratios"].get(name)
        told = "–" if value is None else f"{value:.2f}"
        lines.append(f"| {name} | {told} | {low:g} | {high:g} | {result['verdicts'].get(name, 'not measured')} |")
    start = result["cold_start_s"]
    if start is not None:
        most, aim = COLD_START_BARS
        lines.append(f"| cold_start_s | {start:.2f} | ≤ {most:g} | ≤ {aim:g} | {result['verdicts']['cold_start_s']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="what a reader must know of the circumstances")
    asked = parser.parse_args()
    result = collect([read_run(path) for path in asked.runs], asked.note)
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
