"""Measure a checkpoint on the held-out tests, beside a blank picture; prints a table and writes JSON.

python recipes/bundled/evaluate.py --model src/smolvlm_fms/assets/demo --out recipes/bundled/RESULTS.json
python recipes/bundled/evaluate.py --run runs/bundled        # the newest checkpoint of a run
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from export import latest
from held_out import score
from sources import DEFAULT_WORK
from train import build

README = Path(__file__).parent / "README.md"


def write_table(table: dict[str, dict[str, float]]) -> None:
    """Put the results between the marks in the recipe's README."""
    lines = ["| test | right | with a blank picture | questions |", "|---|---|---|---|"]
    lines += [f"| {test} | {r['score']:.1%} | {r['blank']:.1%} | {r['n']} |" for test, r in table.items()]
    text = README.read_text(encoding="utf-8")
    start, end = text.index("<!-- results -->") + len("<!-- results -->"), text.index("<!-- /results -->")
    README.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--number", type=int, default=400)
    parser.add_argument("--seen", action="store_true", help="the generator's training side instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.run:
        model, name = build(args.work, None), str(args.run)
        name += f" step {latest(args.run, model)}"
    else:
        from smolvlm_fms.fms_bridge.loading import load_model

        model, name = load_model(args.model, dtype=torch.float32), str(args.model)
    table = score(model, args.work, args.number, held_out=not args.seen)
    for test, row in table.items():
        print(f"{test:18} {row['score']:6.1%}   blank {row['blank']:6.1%}   n {row['n']}")
    if args.out:
        args.out.write_text(json.dumps({"model": name, "skills": table}, indent=2) + "\n", encoding="utf-8")
        write_table(table)


if __name__ == "__main__":
    main()
