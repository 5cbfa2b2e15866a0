"""What ``smolvlm verify`` shows to both libraries: pictures, a video, questions, and a processor's inputs for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

__all__ = ["Case", "cases", "prepare"]


@dataclass(frozen=True)
class Case:
    """One question about pictures, or about the frames (T, H, W, C) of a video, 8-bit."""

    name: str
    question: str
    pictures: tuple[Image.Image, ...] = ()
    frames: np.ndarray[Any, Any] | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, in the form that chat templates read."""
        parts = [{"type": "image"}] * len(self.pictures) + [{"type": "video"}] * (self.frames is not None)
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


def cases(videos: bool) -> Iterator[Case]:
    """No picture, a small one, a wide one, two slim ones at once, and with ``videos`` a film of three frames.

    Slim pictures have few tiles: on a full-size checkpoint nearly all the time goes into the tower.
    """
    rng = np.random.default_rng(7)

    def pixels(width: int, height: int) -> np.ndarray[Any, Any]:
        """Smooth colours with hard edges and some noise: every resampling shows its rounding on it."""
        y, x = np.mgrid[0:height, 0:width]
        planes = [np.sin(x / 23) * 90, np.cos(y / 31) * 90, ((x // 40 + y // 40) % 2) * 120.0]
        values = np.stack(planes, -1) + 110 + rng.normal(0, 12, (height, width, 3))
        return np.asarray(values.clip(0, 255), dtype=np.uint8)

    def picture(width: int, height: int) -> Image.Image:
        return Image.fromarray(pixels(width, height))

    yield Case("text only", "What is the capital of France?")
    yield Case("small picture", "What is this?", (picture(200, 160),))
    yield Case("wide picture", "Describe the picture.", (picture(900, 400),))
    yield Case("two pictures", "What differs?", (picture(120, 480), picture(64, 16)))
    if videos:
        yield Case("video", "What happens?", frames=np.stack([pixels(160, 120) for _ in range(3)]))


def prepare(processor: Any, case: Case) -> dict[str, Tensor]:
    """What ``processor``, ours or transformers', makes of a case: one row, tensors."""
    text = processor.apply_chat_template(case.messages, add_generation_prompt=True)
    media: dict[str, Any] = {"images": [list(case.pictures)]} if case.pictures else {}
    if case.frames is not None:
        count = len(case.frames)
        known = {"total_num_frames": count, "fps": 1.0, "duration": float(count), "frames_indices": list(range(count))}
        media = {"videos": [[case.frames]], "video_metadata": [known]}
    return dict(processor(text=[text], return_tensors="pt", **media))
