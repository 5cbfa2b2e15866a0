"""Run the packaged held-out tests on the bundled model, and write down what came out.

python recipes/bundled/evaluate.py                  # RESULTS.json, the table in README.md, MODEL_CARD.md
python recipes/bundled/evaluate.py --card           # only the two documents, from RESULTS.json as it is

Any other checkpoint: `smolvlm eval FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import model_card

FOLDER = Path(__file__).parent
DEMO = Path("src/smolvlm_fms/assets/demo")


def measure(model: Path, save: Path | None) -> None:
    """What `smolvlm eval MODEL --json` prints, into RESULTS.json; the bundled model is named as users name it."""
    import smolvlm_fms as sv
    from rich.progress import track
    from smolvlm_fms.evaluation.journal import Journal, fingerprint
    from smolvlm_fms.evaluation.report import as_object
    from smolvlm_fms.evaluation.run import evaluate
    from smolvlm_fms.evaluation.suite import find_suites

    suites = find_suites()
    vlm = sv.load(model)
    with Journal(save, {"model": str(model), "checkpoint": fingerprint(model)}) as journal:
        outcomes = list(track(evaluate(vlm, suites, journal=journal), "testing", total=len(suites)))
    results = as_object("demo" if model == DEMO else str(model), outcomes)
    (FOLDER / "RESULTS.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--card", action="store_true", help="measure nothing")
    parser.add_argument("--save", type=Path, help="every answer in this JSONL; the same command again goes on")
    args = parser.parse_args()
    if not args.card:
        measure(args.model, args.save)
    model_card.write(FOLDER)


if __name__ == "__main__":
    main()
