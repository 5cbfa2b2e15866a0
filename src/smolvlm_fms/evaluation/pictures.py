"""An item's messages with their pictures in place, or with grey ones of the same sizes."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageSequence

from smolvlm_fms.errors import SmolVLMError, VideoError
from smolvlm_fms.evaluation.suite import Item, Suite
from smolvlm_fms.processing.sources import load_image
from smolvlm_fms.processing.video_decode import decode_video

__all__ = ["filled"]

GREY = (128, 128, 128)
STATED_RATE = 24.0
"""Frames a second of pictures in a row that say nothing of it: what processors assume, and training as well."""
ANIMATIONS = ("GIF", "PNG", "WEBP")
"""Formats of moving pictures that Pillow reads, so that a clip of a few frames needs no video library."""


def filled(suite: Suite, item: Item, processor: Any, *, blank: bool = False) -> list[dict[str, Any]]:
    """The item's messages as the engine takes them, each picture loaded, upright and as it is.

    blank: a grey picture of the same size in place of each, and a grey frame for every frame that ``processor`` (the
    checkpoint's) takes of a video. Raises ImageError, VideoError or FetchError, naming the item's place.
    """
    try:
        return [
            {**message, "content": [_part(suite, part, processor, blank) for part in message["content"]]}
            for message in item.messages
        ]
    except SmolVLMError as error:
        raise type(error)(f"{suite.name}: {item.place}: {error}") from error


def _part(suite: Suite, part: dict[str, Any], processor: Any, blank: bool) -> dict[str, Any]:
    kind = part["type"]
    if kind == "image":
        picture = _picture(suite, part["path"])
        return {"type": kind, kind: _grey(picture) if blank else picture}
    if kind == "video":
        clip, rate = _clip(suite, part["path"], processor, blank)
        return {"type": kind, kind: clip} | ({"fps": part.get("fps", rate)} if isinstance(clip, list) else {})
    return part


def _picture(suite: Suite, where: str) -> Any:
    return load_image(_source(suite, where))


def _source(suite: Suite, where: str) -> str | bytes:
    return where if "://" in where[:8] or where[:5].lower() == "data:" else suite.read(where)


def _grey(picture: Image.Image) -> Image.Image:
    return Image.new("RGB", picture.size, GREY)


def _clip(suite: Suite, where: str | list[str], processor: Any, blank: bool) -> tuple[Any, float]:
    """A video as frames where it is made of pictures, else as the file that the checkpoint's processor samples; and
    the rate of the frames."""
    rate = STATED_RATE
    if isinstance(where, list):
        frames = [_picture(suite, name) for name in where]
    else:
        source = _source(suite, where)
        moving = _animation(source)
        if moving is None and not blank:
            return source, rate
        frames, rate = _sampled(source, processor) if moving is None else moving
    return ([_grey(frame) for frame in frames] if blank else frames), rate


def _animation(source: str | bytes) -> tuple[list[Image.Image], float] | None:
    """Every frame of a GIF, WebP or PNG, and how many make a second on average; None for anything else."""
    if isinstance(source, str):
        return None
    frames, milliseconds = [], 0.0
    try:
        with Image.open(io.BytesIO(source), formats=ANIMATIONS) as film:
            for frame in ImageSequence.Iterator(film):
                frames.append(frame.convert("RGB"))  # which reads the frame, and with it how long it is shown
                milliseconds += frame.info.get("duration") or 0
    except (OSError, SyntaxError, ValueError):
        return None
    return frames, 1e3 * len(frames) / milliseconds if milliseconds > 0 else STATED_RATE


def _sampled(source: str | bytes, processor: Any) -> tuple[list[Image.Image], float]:
    """The frames that the checkpoint takes of a video file, and how many of them make a second."""
    video = processor.video_processor
    if video is None:
        raise VideoError("This checkpoint was not trained on videos.")
    known = video.fps is not None and video.num_frames is not None
    frames, metadata = decode_video(source, video.sample_frames if known else None)
    return [Image.fromarray(frame) for frame in frames], metadata.sampled_fps
