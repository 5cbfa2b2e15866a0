"""Chosen frames of a video file, decoded by PyAV (the extra ``video``).

    path, bytes, URL, data: URI, open file ──▶ scan: every packet's time, without decoding (exact count, rate, length)
                                           ──▶ choose(metadata): frame numbers
                                           ──▶ decode: seek to the key frame before each, upright RGB, shrunk at once

Frames are numbered in the order they are shown. Only the frames asked for are converted, and each is handed to
``shrink`` as soon as it is decoded, so a long film never lies in memory at its full size.

The demuxers and protocols that FFmpeg may use are listed: a playlist or a concat script that names other files or
addresses is refused, because the file comes from strangers.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from smolvlm_fms.errors import FetchError, ImageError, MissingDependencyError, VideoError
from smolvlm_fms.processing import sources

__all__ = ["MAX_VIDEO_BYTES", "Frame", "VideoMetadata", "VideoSource", "decode_video", "probe_video"]

#: One video file, in any form that is understood.
VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"

#: One frame: height × width × RGB, uint8.
Frame: TypeAlias = npt.NDArray[Any]

#: A download, data: URI or open file of more bytes is refused; files on disk are read piece by piece.
MAX_VIDEO_BYTES = 1024**3
#: Seconds for a whole download.
FETCH_SECONDS = 120.0

_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,gif,apng,ogg,asf,nut,"
    "mjpeg,webp_pipe,dv"
)
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
# Decoding on is quicker than a seek when the frame is this near.
_NEAR = 8


@dataclass
class VideoMetadata(Mapping[str, Any]):
    """What is known of a video; the record of the same name in transformers.

    fps: frames a second on average; duration: seconds; width, height: pixels, upright; frames_indices: numbers of the
    frames that were taken.
    """

    total_num_frames: int
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    video_backend: str | None = None
    frames_indices: Sequence[int] | npt.NDArray[np.int64] | None = None

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    @property
    def timestamps(self) -> list[float]:
        """Seconds of the taken frames, at the average rate."""
        if self.fps is None or self.frames_indices is None:
            raise VideoError("The frames' times need both `fps` and `frames_indices` in the video's metadata.")
        return [index / self.fps for index in self.frames_indices]

    @property
    def sampled_fps(self) -> float:
        """Frames a second of the taken frames (24 where the video's own rate is unknown)."""
        if self.frames_indices is None or not self.total_num_frames or self.fps is None:
            return self.fps or 24
        return len(self.frames_indices) / self.total_num_frames * self.fps


@dataclass(frozen=True)
class _Scan:
    """What the packets tell: frame count, the frames' and the key frames' times in display order, rate and length."""

    count: int
    times: list[int] | None
    keys: list[int]
    fps: float | None
    duration: float | None


def probe_video(
    source: VideoSource, *, timeout: float = FETCH_SECONDS, max_bytes: int = MAX_VIDEO_BYTES
) -> VideoMetadata:
    """Metadata of a video without decoding it. Raises what ``decode_video`` raises."""
    handle, name = _handle(source, timeout, max_bytes)
    with _opened(handle, name) as (container, stream):
        return _metadata(stream, _scan(container, stream, handle, name))


def decode_video(
    source: VideoSource,
    choose: Callable[[VideoMetadata], Sequence[int]] | None = None,
    *,
    shrink: Callable[[Frame], Frame] | None = None,
    timeout: float = FETCH_SECONDS,
    max_bytes: int = MAX_VIDEO_BYTES,
) -> tuple[list[Frame], VideoMetadata]:
    """Frames of a video, each (H, W, 3) uint8 RGB and upright, and its metadata.

    choose: frame numbers to take (ascending, each once), given the metadata; None takes every frame.
    shrink: applied to each frame on its own, so that full-size frames are not kept.

    Raises VideoError (damaged, no picture stream, no frames, frames too large), FetchError (cannot be read),
    MissingDependencyError (PyAV is not installed).
    """
    handle, name = _handle(source, timeout, max_bytes)
    with _opened(handle, name) as (container, stream):
        scan = _scan(container, stream, handle, name)
        metadata = _metadata(stream, scan)
    wanted = list(range(scan.count)) if choose is None else [int(index) for index in choose(metadata)]
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= scan.count:
        raise VideoError(
            f"{name}: the frames to take must be ascending numbers in 0 … {scan.count - 1}, each once, "
            f"got {wanted!r:.80}."
        )
    frames = _take(handle, name, scan, wanted, shrink, metadata)
    metadata.frames_indices = np.asarray(wanted)
    return frames, metadata


def _take(
    handle: Any, name: str, scan: _Scan, wanted: list[int], shrink: Callable[[Frame], Frame] | None,
    metadata: VideoMetadata,
) -> list[Frame]:  # fmt: skip
    """Decode by times with seeks; where a file's times do not lead to its frames, by counting from the start."""
    for by_time in (True, False):
        if by_time and scan.times is None:
            continue
        with _opened(handle, name) as (container, stream):
            stream.thread_type = "AUTO"
            pick = _frames_by_time(container, stream, scan, wanted) if by_time else _frames_by_count(container, wanted)
            taken: list[Frame] = []
            size: tuple[int, int] | None = None
            for frame in pick:
                size = size or (frame.width, frame.height)
                rgb_HWC = _upright_rgb(frame, size, name)
                metadata.height, metadata.width = rgb_HWC.shape[:2]
                taken.append(shrink(rgb_HWC) if shrink else rgb_HWC)
        if len(taken) == len(wanted):
            return taken
    raise VideoError(
        f"{name}: damaged or cut short: {len(taken)} of the {len(wanted)} frames asked for could be decoded "
        f"(the file lists {scan.count})."
    )


def _frames_by_time(container: Any, stream: Any, scan: _Scan, wanted: list[int]) -> Iterator[Any]:
    """The wanted frames, found by their times; stops early where a time does not lead to its frame."""
    assert scan.times is not None
    decoder = container.decode(stream)
    reached = None  # time of the last frame decoded
    for index in wanted:
        target = scan.times[index]
        key = bisect_right(scan.keys, target) - 1
        far = scan.times[max(index - _NEAR, 0)]
        if key >= 0 and (reached is None or reached < far) and (scan.keys[key] > (reached or scan.times[0])):
            container.seek(scan.keys[key], stream=stream)
            decoder = container.decode(stream)
        found = next((frame for frame in decoder if frame.pts is None or frame.pts >= target), None)
        if found is None or found.pts != target:
            return
        reached = target
        yield found


def _frames_by_count(container: Any, wanted: list[int]) -> Iterator[Any]:
    remaining = iter(wanted)
    target = next(remaining)
    for index, frame in enumerate(container.decode(video=0)):
        if index == target:
            yield frame
            if (following := next(remaining, None)) is None:
                return
            target = following


def _upright_rgb(frame: Any, size: tuple[int, int], name: str) -> Frame:
    _check_size(frame.width, frame.height, name)
    same = (frame.width, frame.height) == size
    rgb: Frame = (
        frame.to_ndarray(format="rgb24")
        if same
        else frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
    )  # fmt: skip
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def _scan(container: Any, stream: Any, handle: Any, name: str) -> _Scan:
    packets = [
        (packet.pts, packet.duration or 0, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]
    times = [time for time, _, _ in packets]
    rate = stream.average_rate or stream.guessed_rate
    if None in times or len(set(times)) != len(times):
        count = _count_by_decoding(handle, name)
        fps = float(rate) if rate else None
        return _checked(_Scan(count, None, [], fps, count / fps if fps else None), name)
    packets.sort(key=lambda packet: packet[0])
    count = len(packets)
    times = [time for time, _, _ in packets]
    length = Fraction(0)
    if count:
        ticks = times[-1] - times[0]
        last = packets[-1][1] or (Fraction(ticks, count - 1) if count > 1 else 0)
        length = (ticks + last) * stream.time_base
    if not length and rate:
        length = count / Fraction(rate)
    return _checked(
        _Scan(
            count,
            times,
            [time for time, _, key in packets if key],
            float(count / length) if length else None,
            float(length) if length else None,
        ),
        name,
    )


def _checked(scan: _Scan, name: str) -> _Scan:
    if scan.count == 0:
        raise VideoError(f"{name}: the video holds no frames.")
    return scan


def _count_by_decoding(handle: Any, name: str) -> int:
    with _opened(handle, name) as (container, stream):
        stream.thread_type = "AUTO"
        return sum(1 for _ in container.decode(stream))


def _metadata(stream: Any, scan: _Scan) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=scan.count,
        fps=scan.fps,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        duration=scan.duration,
        video_backend="pyav",
    )


@contextmanager
def _opened(handle: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its picture stream; whatever FFmpeg raises inside becomes a VideoError."""
    av = _av()
    if not isinstance(handle, str):
        handle.seek(0)
    try:
        with av.open(handle, options=_OPTIONS, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError(f"{name}: no picture stream; a sound file?")
            if stream.codec_context is None:
                raise VideoError(f"{name}: the pictures are coded in a way that FFmpeg does not know, or damaged.")
            _check_size(stream.codec_context.width, stream.codec_context.height, name)
            yield container, stream
    except VideoError:
        raise
    except (av.FFmpegError, ValueError, OverflowError, EOFError) as error:
        raise VideoError(f"{name}: not a video that can be read, or damaged: {error}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > sources.MAX_PIXELS:
        raise VideoError(
            f"{name}: frames of {width}×{height} pixels are more than the limit of {sources.MAX_PIXELS:,}."
        )


def _handle(source: VideoSource, timeout: float, max_bytes: int) -> tuple[Any, str]:
    """What PyAV opens (a ``file:`` address or a seekable stream of bytes) and what messages call it."""
    _av()
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), f"The {len(source)} bytes"
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        return io.BytesIO(sources.fetch(source, timeout=timeout, max_bytes=max_bytes)), source
    if isinstance(source, str) and source[:5].lower() == "data:":
        try:
            return io.BytesIO(sources._data_uri(source, max_bytes)), "The data: URI"
        except ImageError as error:
            raise VideoError(str(error)) from error
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source).removeprefix("file://")
        try:
            found = Path(text).is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise FetchError(f"{text!r:.200}: no such file. Pass a path, an http(s) URL or a data: URI of a video.")
        return f"file:{Path(text).absolute()}", text
    if hasattr(source, "read"):
        data = source.read(max_bytes + 1)
        if not isinstance(data, bytes) or len(data) > max_bytes:
            raise VideoError(f"The open file must give at most {max_bytes:,} bytes; open it in binary mode ('rb').")
        return io.BytesIO(data), "The open file"
    raise VideoError(f"A video cannot be read from {type(source).__name__}. Pass a path, URL, data: URI or bytes.")


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            "Reading video files needs PyAV, which is not installed: pip install 'smolvlm-fms[video]'. "
            "Frames that are already decoded (lists of pictures, arrays, tensors) need nothing."
        ) from error
    return av
