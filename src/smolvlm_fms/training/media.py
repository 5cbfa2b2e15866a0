"""What pictures and videos become in a sample: their prompts (from headers alone, where that will do) and their tiles.

pictures, videos ─▶ plan: prompts, number of tiles         nothing is decoded
                 ─▶ load: prompts, tiles (N, C, H, W)       in the order in which the text shows them
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from smolvlm_fms.config_llava import AnyResolution
from smolvlm_fms.errors import ImageError, InputError, PromptError, SmolVLMError, VideoError
from smolvlm_fms.processing.geometry import tile_count
from smolvlm_fms.processing.prompt import image_prompt, video_prompt
from smolvlm_fms.processing.rows import lay_out_rows
from smolvlm_fms.processing.sources import load_image
from smolvlm_fms.processing.video import VideoMetadata
from smolvlm_fms.processing.video_decode import probe_video

__all__ = ["Media", "Prompts", "Video", "media_for", "picture_source", "video_source"]

UNKNOWN_RATE = 24.0
"""Frames a second of frames whose rate is not given; what the processor assumes, too."""


@dataclass(frozen=True)
class Video:
    """A video file (path, URL or bytes), or a list of frames (pictures in any form) with their rate, if it is known."""

    source: Any
    fps: float | None = None

    @property
    def is_frames(self) -> bool:
        """Whether the frames are given one by one."""
        return isinstance(self.source, list)

    @property
    def metadata(self) -> VideoMetadata:
        """Of given frames: all of them are taken, at their rate."""
        count, rate = len(self.source), self.fps or UNKNOWN_RATE
        return VideoMetadata(count, rate, duration=count / rate if self.fps else None, frames_indices=range(count))


@dataclass(frozen=True)
class Prompts:
    """Texts of pictures and of videos, in their order, and how many tiles they are in all."""

    images: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    tiles: int = 0


class Media(Protocol):
    """A checkpoint's way with pictures and videos; sent to worker processes."""

    def plan(self, pictures: Sequence[Any], videos: Sequence[Video]) -> Prompts:
        """Prompts from headers; raises a SmolVLMError for what cannot be read."""
        ...

    def load(
        self, pictures: Sequence[Any], videos: Sequence[Video], kinds: Sequence[str]
    ) -> tuple[Prompts, dict[str, Tensor]]:
        """Prompts, and the pixel fields of a ``Sample``. kinds: "image" and "video" in the text's order."""
        ...


class TileMedia:
    """SmolVLM, Idefics3: pictures in grids of tiles, one tile a frame of a video."""

    def __init__(self, processor: Any) -> None:
        self.images = processor.image_processor
        self.videos = processor.video_processor
        self.length = processor.image_seq_len
        self.tokens = processor.tokens

    def plan(self, pictures: Sequence[Any], videos: Sequence[Video]) -> Prompts:
        plans = [self.images.plan(*upright_size(picture)) for picture in pictures]
        clips = [self._metadata(number, video) for number, video in enumerate(videos)]
        frames = sum(len(clip.timestamps) for clip in clips)
        return self._prompts([(one.rows, one.cols) for one in plans], clips, sum(one.count for one in plans) + frames)

    def load(
        self, pictures: Sequence[Any], videos: Sequence[Video], kinds: Sequence[str]
    ) -> tuple[Prompts, dict[str, Tensor]]:
        batch: dict[str, Any] = {}
        grids: list[tuple[int, int]] = []
        if pictures:
            batch = dict(self.images([list(pictures)], return_tensors="pt", return_row_col_info=True, do_pad=True))
            grids = list(zip(batch.pop("rows")[0], batch.pop("cols")[0], strict=True))
        tiles = [tile_count(rows, cols) for rows, cols in grids]
        clips = [self._clip(number, video) for number, video in enumerate(videos)]
        metadata = [clip.pop("video_metadata")[0] for clip in clips]
        if clips:
            frames = [len(clip["pixel_values"][0]) for clip in clips]
            rows = {"pixel_values": [clip["pixel_values"][0] for clip in clips]}
            batch = lay_out_rows([kinds], batch or None, tiles, rows, frames, "pt")
        if not batch:
            return Prompts(), {}
        found = {"pixel_values": batch["pixel_values"][0]}
        mask = batch.get("pixel_attention_mask")
        if mask is not None and not bool(mask[0].all()):  # pictures smaller than a tile, where nothing is resized
            found["pixel_attention_mask"] = mask[0].bool()
        return self._prompts(grids, metadata, len(found["pixel_values"])), found

    def _prompts(self, grids: Sequence[tuple[int, int]], clips: Sequence[VideoMetadata], tiles: int) -> Prompts:
        pictures = [image_prompt(rows, cols, self.length, self.tokens) for rows, cols in grids]
        videos = []
        for clip in clips:
            clip.fps = clip.fps or UNKNOWN_RATE
            stamps = clip.timestamps
            videos.append(video_prompt(stamps, clip.duration, len(stamps), self.length, self.tokens))
        return Prompts(pictures, videos, tiles)

    def _metadata(self, number: int, video: Video) -> VideoMetadata:
        self._check()
        if video.is_frames:
            return video.metadata
        try:
            metadata = probe_video(video.source)
            chosen = self.videos.sample_frames(metadata) if self._samples else range(metadata.total_num_frames)
        except SmolVLMError as error:
            raise VideoError(f"Video {number} cannot be read: {error}") from error
        metadata.frames_indices = chosen
        return metadata

    def _clip(self, number: int, video: Video) -> dict[str, Any]:
        self._check()
        try:
            if video.is_frames:
                frames = [load_image(frame) for frame in video.source]
                given: Any = {"video_metadata": [video.metadata], "do_sample_frames": False}
                return dict(self.videos([frames], return_tensors="pt", return_metadata=True, **given))
            sampled = self._samples
            return dict(
                self.videos([video.source], return_tensors="pt", return_metadata=True, do_sample_frames=sampled)
            )
        except SmolVLMError as error:
            raise VideoError(f"Video {number} cannot be read: {error}") from error

    @property
    def _samples(self) -> bool:
        return self.videos.fps is not None and self.videos.num_frames is not None

    def _check(self) -> None:
        if self.videos is None:
            raise VideoError("This checkpoint's processor has no settings for videos; SmolVLM2's have.")


class PictureMedia:
    """LLaVA-Next: pictures in tiles of any resolution, as many tokens as their shape has patches; no videos."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        options = processor.image_processor
        self.side = options.crop_size["height"]
        pinpoints = tuple((int(height), int(width)) for height, width in options.image_grid_pinpoints)
        self.geometry = AnyResolution(pinpoints, self.side, self.side // processor.patch_size)

    def plan(self, pictures: Sequence[Any], videos: Sequence[Video]) -> Prompts:
        if videos:
            raise VideoError("LLaVA-Next takes pictures and text; a video came.")
        return self._prompts([upright_size(picture) for picture in pictures])

    def load(
        self, pictures: Sequence[Any], videos: Sequence[Video], kinds: Sequence[str]
    ) -> tuple[Prompts, dict[str, Tensor]]:
        if videos:
            raise VideoError("LLaVA-Next takes pictures and text; a video came.")
        if not pictures:
            return Prompts(), {}
        batch = self.processor.image_processor([list(pictures)], return_tensors="pt", do_pad=True)
        sizes = [(int(height), int(width)) for height, width in batch["image_sizes"]]
        counts = [self.geometry.num_tiles(size) for size in sizes]
        tiles = torch.cat([tiles[:count] for tiles, count in zip(batch["pixel_values"], counts, strict=True)])
        return self._prompts(sizes), {"pixel_values": tiles, "image_sizes": torch.tensor(sizes)}

    def _prompts(self, sizes: Sequence[tuple[int, int]]) -> Prompts:
        tile, token = (self.side, self.side), self.processor.image_token
        texts = [token * self.processor.num_image_tokens(size, tile) for size in sizes]
        return Prompts(texts, [], sum(self.geometry.num_tiles(size) for size in sizes))


def media_for(processor: Any) -> Media:
    """The way that belongs to a processor."""
    return TileMedia(processor) if hasattr(processor, "image_seq_len") else PictureMedia(processor)


def picture_source(source: Any, folder: Path) -> Any:
    """A picture's source in a form that ``load_image`` reads; relative paths start at ``folder``."""
    if isinstance(source, Mapping):  # how parquet files and `datasets` write pictures
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str) and not source.startswith(("http://", "https://", "data:")) and len(source) < 1024:
        return str(folder / Path(source).expanduser())
    if source is None:
        raise InputError("A picture or video is None; it needs a path or bytes.")
    return source


def video_source(source: Any, folder: Path, fps: Any = None) -> Video:
    """A video's source: a file, or a list of frames, each as a picture's source."""
    if fps is not None and not (isinstance(fps, int | float) and fps > 0):
        raise PromptError(f"A video's fps is {fps!r}; it is a number of frames a second.")
    if not isinstance(source, list | tuple):
        return Video(picture_source(source, folder), fps)
    if not source:
        raise InputError("A video has no frames.")
    return Video([picture_source(frame, folder) for frame in source], fps)


def upright_size(picture: Any) -> tuple[int, int]:
    """(height, width) of an upright picture, from its header where that is enough."""
    try:
        if isinstance(picture, str) and not picture.startswith(("http://", "https://", "data:")):
            with Image.open(picture) as opened:
                return _turned(opened)
        if isinstance(picture, bytes):
            with Image.open(io.BytesIO(picture)) as opened:
                return _turned(opened)
    except FileNotFoundError:
        raise ImageError(f"There is no picture {picture}.") from None
    except Exception as error:  # decoders of untrusted bytes raise whatever they trip over
        raise ImageError(f"The picture {_short(picture)} cannot be read: {error}") from None
    loaded = load_image(picture)
    if isinstance(loaded, Image.Image):
        return loaded.height, loaded.width
    height, width = loaded.shape[-3:-1] if loaded.shape[-1] in (1, 3, 4) else loaded.shape[-2:]
    return int(height), int(width)


def _turned(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 … 8 swap the sides
    return (image.width, image.height) if turned else (image.height, image.width)


def _short(picture: Any) -> str:
    return str(picture) if isinstance(picture, str) else f"of {len(picture)} bytes"
