"""A parity certificate in words: Markdown tables of what ``smolvlm verify`` found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["COLUMNS", "STAGES", "checks_table", "number", "summary_table"]

COLUMNS = ("check", "max abs difference", "bound", "reference's own noise", "agree", "verdict")
STAGES = ("ids", "pixels", "features", "logits", "greedy text")
TOKENS = ("ids", "greedy text")

Report = Mapping[str, Any]


def checks_table(report: Report) -> str:
    """Every check of one report as a Markdown table, and what was left out below it."""
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    for check in report["checks"]:
        verdict = "ok" if check["ok"] else "differs"
        noise = check["reference_noise"]
        cells = [
            check["name"],
            number(check["max_abs"]),
            number(check["bound"]),
            "" if noise is None else number(noise),
        ]
        lines.append(_row([*cells, f"{check['agree']:.4f}", verdict]))
    lines += [f"\nNot compared: {left['name']}: {left['reason']}." for left in report["skipped"]]
    return "\n".join(lines)


def summary_table(reports: Iterable[tuple[str, Report]]) -> str:
    """Reports by name, a line each: of every stage the largest difference over all cases (of token ids the smallest
    share that agrees), and the logits' bounds.
    """
    header = ("family", "dtype", *STAGES, "logits' bound", "verdict")
    lines = [_row(header), _row(["---"] * len(header))]
    for name, report in reports:
        worst = []
        for stage in STAGES:
            found = [check for check in report["checks"] if check["name"].endswith(f": {stage}")]
            if stage in TOKENS:
                worst.append(f"{min(check['agree'] for check in found):.0%}")
            else:
                worst.append(number(max(check["max_abs"] for check in found)))
        bounds = [check["bound"] for check in report["checks"] if check["name"].endswith(": logits")]
        verdict = "ok" if report["ok"] else "differs"
        lines.append(_row([name, report["dtype"], *worst, f"{number(min(bounds))} … {number(max(bounds))}", verdict]))
    return "\n".join(lines)


def number(value: float) -> str:
    """Two digits; nothing behind a zero."""
    return "0" if value == 0 else f"{value:.1e}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
