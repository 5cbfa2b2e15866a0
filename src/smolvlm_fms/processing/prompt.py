"""From placeholders to prompt text: what one picture or one video becomes in front of the tokenizer.

    "<image>"  ─▶  <fake><row_1_col_1><image>×n<fake><row_1_col_2><image>×n … \\n   one line a row of tiles
                   \\n<fake><global-img><image>×n<fake>                              the overview comes last
    "<video>"  ─▶  "You are provided the following series of twelve frames from a 0:00:10 [H:MM:SS] video.\\n"
                   "\\nFrame from 00:01:" <fake><global-img><image>×n<fake> …       one line a frame, then "\\n\\n"

Texts and integers only: no pixels, no tokenizer. The grids come from ``geometry``, the token count from the processor.
The layout is that of the Idefics3 and SmolVLM checkpoints; a different newline changes what the model reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from smolvlm_fms.errors import PromptError

__all__ = [
    "Placeholder",
    "PlaceholderTokens",
    "check_counts",
    "expand_placeholders",
    "image_prompt",
    "number_in_words",
    "video_prompt",
]

VIDEO_INTRODUCTION = "You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
FRAME_INTRODUCTION = "\nFrame from {stamp}:"
VIDEO_END = "\n\n"

_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class PlaceholderTokens:
    """The special tokens that frame a picture, as the tokenizer spells them."""

    image: str = "<image>"
    fake: str = "<fake_token_around_image>"
    overview: str = "<global-img>"
    video: str = "<video>"


@dataclass(frozen=True)
class Placeholder:
    """One placeholder and what took its place.

    kind: ``"image"`` or ``"video"``; span: (start, end) in characters of the text before; new_span: the same after;
    text: the placeholder; replacement: what it became.
    """

    kind: str
    span: tuple[int, int]
    new_span: tuple[int, int]
    text: str
    replacement: str

    def as_dict(self) -> dict[str, Any]:
        """The record that transformers returns for ``return_text_replacement_offsets=True``."""
        return {
            "type": self.kind,
            "span": self.span,
            "new_span": self.new_span,
            "text": self.text,
            "replacement": self.replacement,
        }


def image_prompt(rows: int, cols: int, image_seq_len: int, tokens: PlaceholderTokens | None = None) -> str:
    """Text of one picture of ``rows`` × ``cols`` tiles and its overview; 0 × 0 is the overview alone.

    image_seq_len: ``<image>`` tokens a tile (tokens per tile after the connector).
    """
    tokens = tokens or PlaceholderTokens()
    images = tokens.image * image_seq_len
    overview = f"{tokens.fake}{tokens.overview}{images}{tokens.fake}"
    if rows == 0 and cols == 0:
        return overview
    lines = (
        "".join(f"{tokens.fake}<row_{row}_col_{col}>{images}" for col in range(1, cols + 1))
        for row in range(1, rows + 1)
    )
    return "".join(f"{line}\n" for line in lines) + f"\n{overview}"


def video_prompt(
    stamps: Sequence[float], duration: float | None, num_frames: int, image_seq_len: int,
    tokens: PlaceholderTokens | None = None,
) -> str:  # fmt: skip
    """Text of one video: how many frames and seconds there are, then one overview a frame with its MM:SS.

    stamps: seconds of each frame from the start; duration: length of the video in seconds, the last stamp if unknown;
    num_frames: the count that is written in words.

    Raises PromptError for a video without frames.
    """
    if not stamps:
        raise PromptError("A video without frames has no prompt; pass at least one frame.")
    frame = image_prompt(0, 0, image_seq_len, tokens)
    seconds = int(duration if duration is not None else stamps[-1])
    text = VIDEO_INTRODUCTION.format(count=number_in_words(num_frames), duration=_hours_minutes_seconds(seconds))
    for stamp in stamps:
        text += FRAME_INTRODUCTION.format(stamp=f"{int(stamp // 60):02d}:{int(stamp % 60):02d}") + frame
    return text + VIDEO_END


def number_in_words(number: int) -> str:
    """English words of 0 … 999,999: ``"sixty-four"``, ``"one hundred and one"``, ``"two thousand, three hundred"``.

    The checkpoints were trained on the wording of the package num2words, which this follows (a test compares them).
    """
    if not 0 <= number < 1_000_000:
        raise PromptError(f"A video of {number} frames cannot be put into words; pass between 0 and 999,999 frames.")
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return _TENS[tens] + (f"-{_UNITS[unit]}" if unit else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_UNITS[hundreds]} hundred" + (f" and {number_in_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    words = f"{number_in_words(thousands)} thousand"
    if not rest:
        return words
    return words + (" and " if rest < 100 else ", ") + number_in_words(rest)


def expand_placeholders(
    texts: Sequence[str],
    image_prompts: Sequence[str] = (),
    video_prompts: Sequence[str] = (),
    tokens: PlaceholderTokens | None = None,
) -> tuple[list[str], list[list[Placeholder]]]:
    """Put the prompts of pictures and videos where their placeholders stand, in order, across the whole batch.

    Returns the texts and, per text, where each placeholder was and is. A kind without prompts is left alone.

    Raises PromptError where there are fewer prompts than placeholders or more.
    """
    tokens = tokens or PlaceholderTokens()
    waiting = {"image": list(reversed(image_prompts)), "video": list(reversed(video_prompts))}
    spelling = {"image": tokens.image, "video": tokens.video}
    kinds = [kind for kind in spelling if waiting[kind]]
    if not kinds:
        return list(texts), [[] for _ in texts]
    pattern = re.compile("|".join(f"(?P<{kind}>{re.escape(spelling[kind])})" for kind in kinds))
    expanded, placeholders = [], []
    for row, text in enumerate(texts):
        pieces: list[str] = []
        found: list[Placeholder] = []
        end_before = length = 0
        for match in pattern.finditer(text):
            kind = match.lastgroup or ""
            if not waiting[kind]:
                raise PromptError(f"Text {row} holds more {spelling[kind]} placeholders than there are {kind}s.")
            replacement = waiting[kind].pop()
            length += match.start() - end_before
            found.append(
                Placeholder(kind, match.span(), (length, length + len(replacement)), match.group(), replacement)
            )
            pieces += (text[end_before : match.start()], replacement)
            length += len(replacement)
            end_before = match.end()
        expanded.append("".join((*pieces, text[end_before:])))
        placeholders.append(found)
    for kind in kinds:
        if waiting[kind]:
            raise PromptError(f"{len(waiting[kind])} {kind}(s) have no {spelling[kind]} placeholder in the text.")
    return expanded, placeholders


def check_counts(
    texts: Sequence[str], images_per_row: Sequence[int] | None, videos: int | None, tokens: PlaceholderTokens
) -> None:
    """Compare placeholders with what was passed, row by row for pictures and in total for videos.

    images_per_row: pictures of each text, None where no pictures were passed; videos: their number, or None.

    Raises PromptError that names the row, both counts and the likely cause.
    """
    wanted = [text.count(tokens.image) for text in texts]
    if images_per_row is None and any(wanted):
        raise PromptError(
            f"The text holds {sum(wanted)} {tokens.image} placeholder(s) but no picture was passed. "
            f"Pass images=, or take the placeholder out of the text."
        )
    if images_per_row is not None and len(images_per_row) != len(texts):
        raise PromptError(
            f"Pictures were passed for {len(images_per_row)} text(s) but there are {len(texts)} text(s). Nest them: "
            f"one list of pictures for each text, an empty list for a text without a picture."
        )
    for row, (count, passed) in enumerate(zip(wanted, images_per_row or wanted, strict=True)):
        if count != passed:
            raise PromptError(
                f"Text {row} holds {count} {tokens.image} placeholder(s) but {passed} picture(s) were passed for it. "
                f"Write one {tokens.image} per picture; a user's own words must not contain it."
            )
    wanted_videos = sum(text.count(tokens.video) for text in texts)
    if wanted_videos != (videos or 0) and (wanted_videos or videos is not None):
        raise PromptError(
            f"The texts hold {wanted_videos} {tokens.video} placeholder(s) but {videos or 0} video(s) were passed. "
            f"Write one {tokens.video} per video."
        )


def _hours_minutes_seconds(seconds: int) -> str:
    """``H:MM:SS``, with the days in front where there are any, as ``str(datetime.timedelta)`` writes it."""
    return str(timedelta(seconds=seconds))
