"""easy-VQA's test questions (PyPI `easy-vqa`, MIT) as a test that `smolvlm eval --data` reads.

pip install easy-vqa
python examples/eval/from_easy_vqa.py easy-vqa          # writes easy-vqa/easy_vqa.jsonl
smolvlm eval demo --data easy-vqa
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def kind(question: str) -> str:
    """What a question is about."""
    if question.startswith("what"):
        return "color" if "color" in question else "shape"
    return "not there" if " no " in question or " not " in question else "there"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=400, help="questions, drawn from the 9,673 with a fixed seed")
    args = parser.parse_args()
    from easy_vqa import get_test_image_paths, get_test_questions

    questions, answers, numbers = get_test_questions()
    paths = get_test_image_paths()
    chosen = random.Random(0).sample(range(len(questions)), min(args.count, len(questions)))
    args.folder.mkdir(parents=True, exist_ok=True)
    with (args.folder / "easy_vqa.jsonl").open("w", encoding="utf-8") as file:
        for index in chosen:
            question = questions[index]
            row = {
                "images": [str(Path(paths[numbers[index]]).resolve())],
                "question": question[0].upper() + question[1:],
                "answer": answers[index],
                "kind": kind(question),
            }
            file.write(json.dumps(row) + "\n")
    print(f"{len(chosen)} questions in {args.folder / 'easy_vqa.jsonl'}")


if __name__ == "__main__":
    main()
