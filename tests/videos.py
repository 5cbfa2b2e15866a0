"""Little videos, made by PyAV in the test that needs them: frame ``i`` is a grey of ``i * step``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np


def make_video(
    frames: int = 30,
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    step: int = 8,
    container: str = "mp4",
    codec: str = "libx264",
    gop: int = 10,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    audio: bool = False,
    left_half: int | None = None,
) -> bytes:
    """A video of grey frames as the bytes of a file.

    size: (width, height); times: the frames' times in units of 1/fps, for a variable rate; rotation: degrees in the
    display matrix; audio: add a second of silence; left_half: grey of the left half, where it is not the frame's own.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=fps, options={"g": str(gop)} if codec == "libx264" else {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        sound: Any = output.add_stream("aac", rate=16000) if audio else None
        for index in range(frames):
            pixels = np.full((size[1], size[0], 3), (index * step) % 256, np.uint8)
            if left_half is not None:
                pixels[:, : size[0] // 2] = left_half
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (times[index] if times else index), Fraction(1, fps)
            output.mux(stream.encode(frame))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def make_sound() -> bytes:
    """A file with sound and no picture stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        sound: Any = output.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    return buffer.getvalue()


def greys(frames: Sequence[np.ndarray], step: int = 8) -> list[int]:
    """Which frame each of these is, read from its grey."""
    return [round(float(np.median(frame)) / step) for frame in frames]
