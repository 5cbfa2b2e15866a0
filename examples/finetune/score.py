"""How many of the test conversations a model answers right, to the word.

python examples/finetune/score.py MODEL TEST.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import smolvlm_fms as sv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a checkpoint folder or a hub id")
    parser.add_argument("test", type=Path)
    args = parser.parse_args()
    vlm = sv.load(args.model)
    right = count = 0
    for line in args.test.read_text(encoding="utf-8").splitlines():
        asked, answered = (message["content"] for message in json.loads(line)["messages"])
        said = vlm.ask(args.test.parent / asked[0]["path"], asked[1]["text"], max_tokens=8).text.strip()
        right += said == answered[0]["text"]
        count += 1
        if count <= 3:
            print(f"wanted {answered[0]['text']!r}, said {said!r}")
    print(f"{right} of {count} right")


if __name__ == "__main__":
    main()
