"""``SmolVLMVideoProcessor``: videos in any form to the frames that the vision tower reads.

    videos ─▶ decode, or take as they are ─▶ sample frames ─▶ resize to the longest edge, then to one square tile
           ─▶ pixel_values (B, T, C, tile, tile)   pixel_attention_mask (B, T, tile, tile)   video_metadata

Same names, shapes, dtypes and values as transformers' class of this name. Where this one differs on purpose:

* Files are decoded by PyAV, frame by frame and shrunk at once; frames come upright, whatever the camera noted.
* In a ragged batch the mask of missing frames is 0 (transformers: 1), as it is for missing tiles of pictures.
* ``max_image_size`` counts for a call, too; floats in 0…1 are taken as rescaled already; each video's own layout
  (channels first or last) is found out, and one that is ambiguous raises.
* Pictures of a frame list may have different sizes (with ``do_resize``) and modes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from smolvlm_fms.errors import ConfigurationError, ImageError, VideoError
from smolvlm_fms.processing.batch import ProcessedBatch
from smolvlm_fms.processing.files import read_json, write_json
from smolvlm_fms.processing.geometry import MAX_EDGE, resize_to_longest_edge
from smolvlm_fms.processing.options import check_device, standard_form
from smolvlm_fms.processing.pixels import Picture, to_picture
from smolvlm_fms.processing.resample import as_array, prepare, resize
from smolvlm_fms.processing.sources import load_image
from smolvlm_fms.processing.threads import available_threads, in_threads
from smolvlm_fms.processing.tiling import PixelMap, check_channels
from smolvlm_fms.processing.video_decode import Frame, VideoMetadata, VideoSource, decode_video
from smolvlm_fms.processing.video_layout import nest_videos, split_frames

__all__ = ["SmolVLMVideoProcessor", "VideoMetadata", "sample_frame_indices"]

Array: TypeAlias = npt.NDArray[Any]
Shrink: TypeAlias = Callable[[Frame], Frame]

OWN_FILE = "video_preprocessor_config.json"

#: What ``SmolVLMVideoProcessor()`` is when it is given nothing.
DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"longest_edge": 4 * 364},
    "resample": int(Image.Resampling.LANCZOS),
    "max_image_size": {"longest_edge": 364},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": True,
    "do_sample_frames": False,
    "fps": None,
    "num_frames": None,
    "skip_secs": 1,
    "return_metadata": False,
    "input_data_format": None,
    "backend": "torch",
}
#: Arguments that transformers takes for every video processor and that change nothing for SmolVLM's.
_IDLE = ("default_to_square", "do_center_crop", "crop_size", "data_format")
CALL_ONLY = ("return_tensors", "device", "video_metadata", *_IDLE)
_SWITCHES = [name for name, value in DEFAULTS.items() if isinstance(value, bool)]


@dataclass
class _Clip:
    """One video on its way: its frames (H, W, C) and what is known of it; ``unit``: floats that run from 0 to 1."""

    frames: list[Frame]
    metadata: VideoMetadata
    unit: bool = False


class SmolVLMVideoProcessor:
    """Videos to frames, one tile each, for SmolVLM2.

    Every option can be given here or for one call. ``do_sample_frames`` takes ``fps`` frames a second, at most
    ``num_frames``, leaving out ``skip_secs`` seconds at both ends of a long video; without it every frame is taken.
    ``video_sampling`` is the block of released checkpoints (``fps``, ``max_frames``, ``video_size``).
    """

    model_input_names = ("pixel_values", "pixel_attention_mask")

    do_convert_rgb: bool
    do_resize: bool
    size: dict[str, int]
    resample: int
    max_image_size: dict[str, int]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]
    do_pad: bool
    do_sample_frames: bool
    fps: float | None
    num_frames: int | None
    skip_secs: float
    return_metadata: bool
    input_data_format: str | None
    backend: str

    def __init__(self, video_sampling: Mapping[str, Any] | None = None, **options: Any) -> None:
        """
        Raises:
            ConfigurationError: an option does not exist or has a value that cannot be used.
        """
        _check_names(options, [*DEFAULTS, *_IDLE])
        given = {name: value for name, value in options.items() if name in DEFAULTS and value is not None}
        if video_sampling:
            # As in transformers: a size of its own comes before the block's.
            block = {"fps": "fps", "max_frames": "num_frames", "video_size": "size"}
            given = {new: video_sampling[old] for old, new in block.items() if old in video_sampling} | given
        for name, value in (copy.deepcopy(DEFAULTS) | given).items():
            setattr(self, name, _form(name, value))

    def __repr__(self) -> str:
        return f"SmolVLMVideoProcessor({', '.join(f'{name}={value!r}' for name, value in self._settings().items())})"

    def __call__(self, videos: Any, **options: Any) -> ProcessedBatch:
        """See :meth:`preprocess`."""
        return self.preprocess(videos, **options)

    def preprocess(self, videos: Any, **options: Any) -> ProcessedBatch:
        """Process one video or several.

        Args:
            videos: a path, URL, ``data:`` URI, bytes or open file; a list of frames (Pillow images, arrays, or files
                where nested as ``[[[frame, frame]]]``); an array or tensor (T, C, H, W) or (T, H, W, C), or five axes
                for a batch; or lists of these, in any nesting. One picture is a video of one frame.
            options: any option of the constructor, for this call; and ``video_metadata`` (one
                :class:`VideoMetadata` or dictionary a video, needed to sample from frames that are already decoded),
                ``return_tensors`` (``"pt"``, ``"np"`` or None), ``device``.

        Returns:
            ``pixel_values`` (B, T, C, tile, tile) float32 and ``pixel_attention_mask`` (B, T, tile, tile) int64, where
            T is the largest number of frames and missing frames are zero; with ``return_metadata`` also
            ``video_metadata``, a list. Without ``return_tensors`` both are lists of one tensor a video; with
            ``do_pad=False`` there is no mask.

        Raises:
            VideoError: a video is damaged, empty, too large or ambiguous, or cannot be sampled.
            FetchError: a path or URL cannot be read.
            MissingDependencyError: a file, and PyAV is not installed.
            ConfigurationError: an option does not exist or cannot be used.
        """
        chosen = self._resolve(options)
        items = nest_videos(videos)
        known = _known_metadata(options.get("video_metadata"), len(items))
        clips = [self._clip(item, known[row], chosen, row) for row, item in enumerate(items)]
        kind = getattr(options.get("return_tensors"), "value", options.get("return_tensors"))
        batch = _collate(clips, chosen, kind)
        if chosen["return_metadata"]:
            batch["video_metadata"] = [clip.metadata for clip in clips]
        device = check_device(options.get("device"))
        return batch if device is None else batch.to(device)

    def sample_frames(
        self,
        metadata: VideoMetadata | None,
        num_frames: int | None = None,
        fps: float | None = None,
        skip_secs: float | None = None,
        **_: Any,
    ) -> npt.NDArray[np.int64]:
        """Numbers of the frames to take from a video; see :func:`sample_frame_indices`."""
        num_frames = self.num_frames if num_frames is None else num_frames
        fps = self.fps if fps is None else fps
        if num_frames is None or fps is None:
            raise VideoError(
                f"Sampling needs fps and num_frames; they are {fps} and {num_frames}. Pass both, or a checkpoint's "
                f"video_sampling."
            )
        return sample_frame_indices(metadata, num_frames, fps, self.skip_secs if skip_secs is None else skip_secs)

    @property
    def pixel_map(self) -> PixelMap:
        """What rescaling and normalising make of bytes."""
        return _pixel_map(self._settings())

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> SmolVLMVideoProcessor:
        """From a checkpoint's folder: the ``video_processor`` of ``processor_config.json`` (transformers 5),
        ``video_preprocessor_config.json`` (4.57), or the ``video_sampling`` of ``preprocessor_config.json`` (SmolVLM2's
        own). ``options`` override what is written there.

        Raises:
            FetchError: none of the files is there.
            ConfigurationError: a file is no JSON object, or holds values that cannot be used.
        """
        found = find_settings(Path(folder))
        known = {name: value for name, value in found.items() if name in DEFAULTS and value is not None}
        return cls(video_sampling=found.get("video_sampling"), **(known | options))

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write ``video_preprocessor_config.json`` as transformers 4.57 and 5 read it; returns the files written."""
        write_json(Path(folder) / OWN_FILE, self.to_dict())
        return [str(Path(folder) / OWN_FILE)]

    def to_dict(self) -> dict[str, Any]:
        """The settings in transformers' words; what :meth:`save_pretrained` writes."""
        settings = self._settings()
        for name in ("backend", "skip_secs", "input_data_format"):
            settings.pop(name)
        if self.fps is not None and self.num_frames is not None:
            settings["video_sampling"] = {"fps": self.fps, "max_frames": self.num_frames, "video_size": self.size}
        return settings | {"video_processor_type": "SmolVLMVideoProcessor"}

    def _settings(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in DEFAULTS}

    def _resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        _check_names(options, [*DEFAULTS, *CALL_ONLY])
        kind = getattr(options.get("return_tensors"), "value", options.get("return_tensors"))
        if kind not in (None, "pt", "np"):
            raise ConfigurationError(f"return_tensors is {kind!r}; it is 'pt', 'np' or None.")
        if options.get("do_center_crop"):
            raise ConfigurationError("SmolVLM does not crop videos; leave do_center_crop out.")
        given = {name: value for name, value in options.items() if name in DEFAULTS and value is not None}
        return self._settings() | {name: _form(name, value) for name, value in given.items()}

    def _clip(self, item: Any, known: VideoMetadata | None, chosen: Mapping[str, Any], row: int) -> _Clip:
        shrink = _shrinker(chosen)
        try:
            if _is_file(item):
                return self._decoded(item, chosen, shrink)
            return self._given(item, known, chosen, shrink)
        except (ImageError, VideoError) as error:
            raise VideoError(f"Video {row}: {error}") from error

    def _decoded(self, source: VideoSource, chosen: Mapping[str, Any], shrink: Shrink) -> _Clip:
        choose = (lambda metadata: self._sample(metadata, chosen).tolist()) if chosen["do_sample_frames"] else None
        frames, metadata = decode_video(source, choose, shrink=shrink)
        return _Clip(frames, metadata)

    def _given(self, item: Any, known: VideoMetadata | None, chosen: Mapping[str, Any], shrink: Shrink) -> _Clip:
        rgb, order = chosen["do_convert_rgb"], chosen["input_data_format"]
        if isinstance(item, list | tuple):
            if any(_is_file(frame) for frame in item) and chosen["do_sample_frames"]:
                raise VideoError("Frames cannot be sampled from a list of picture files; pass do_sample_frames=False.")
            pictures = in_threads(
                lambda frame: to_picture(load_image(frame), rgb=rgb, order=order), item, available_threads()
            )
            unit = all(picture.unit for picture in pictures)  # one dark frame does not make a video of 0…1
            pictures = [dataclasses.replace(picture, unit=unit) for picture in pictures]
        else:
            given, unit = split_frames(item, rgb=rgb, order=order)
            pictures = [Picture(frame, unit) for frame in given]
        frames = [as_array(prepare(picture, chosen["backend"])) for picture in pictures]
        metadata = known or _guessed_metadata(frames)
        if chosen["do_sample_frames"]:
            indices = self._sample(metadata, chosen)
            if len(indices) and indices[-1] >= len(frames):
                raise VideoError(
                    f"The metadata speaks of {metadata.total_num_frames} frames, but only {len(frames)} were passed."
                )
            frames, metadata.frames_indices = [frames[index] for index in indices], indices
        elif metadata.frames_indices is None:
            metadata.frames_indices = list(range(len(frames)))
        elif len(metadata.frames_indices) != len(frames):
            raise VideoError(
                f"{len(frames)} frames came with {len(metadata.frames_indices)} frames_indices in their metadata."
            )
        return _Clip(in_threads(shrink, frames, available_threads()), metadata, unit)

    def _sample(self, metadata: VideoMetadata, chosen: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        return self.sample_frames(metadata, chosen["num_frames"], chosen["fps"], chosen["skip_secs"])


def sample_frame_indices(
    metadata: VideoMetadata | None, num_frames: int, fps: float, skip_secs: float = 1
) -> npt.NDArray[np.int64]:
    """Numbers of the frames that SmolVLM2 reads: evenly spread, ascending, each once.

    ``fps`` frames for each second, at most ``num_frames`` and at least one; ``skip_secs`` seconds are left out at both
    ends where the rest still lasts more than ``num_frames · fps`` seconds (SmolVLM2's own rule, units as they are).

    Raises VideoError where the video's rate or length is unknown.
    """
    if metadata is None or metadata.fps is None or metadata.duration is None:
        raise VideoError(
            "Frames can be sampled only where the video's fps and duration are known. Pass video_metadata with them, "
            "or do_sample_frames=False."
        )
    total = metadata.total_num_frames
    if total < 1:
        raise VideoError("The video has no frames.")
    wanted = max(min(round(fps * metadata.duration), num_frames), 1)
    start, end = 0, total - 1
    if skip_secs > 0 and metadata.duration - 2 * skip_secs > num_frames * fps:
        start = max(int(skip_secs * metadata.fps), 0)
        end = min(int(total - skip_secs * metadata.fps), total - 1)
    if start >= end:
        start, end = 0, total - 1
    return np.unique(np.linspace(start, end, wanted, dtype=int))


def find_settings(folder: Path) -> dict[str, Any]:
    """The video processor's settings in a checkpoint's folder, from the first file that has some."""
    section = read_json(folder / "processor_config.json", missing_ok=True).get("video_processor")
    if isinstance(section, Mapping):
        return dict(section)
    if (folder / OWN_FILE).is_file():
        return read_json(folder / OWN_FILE)
    return read_json(folder / "preprocessor_config.json")


def _shrinker(chosen: Mapping[str, Any]) -> Shrink:
    """Both resizes of one frame: to the longest edge, the aspect kept, and then to a square."""
    if not chosen["do_resize"]:
        return lambda frame_HWC: frame_HWC
    size, tile = chosen["size"], chosen["max_image_size"]["longest_edge"]
    resample, backend = Image.Resampling(chosen["resample"]), chosen["backend"]

    def shrink(frame_HWC: Frame) -> Frame:
        height, width = frame_HWC.shape[:2]
        first = (
            resize_to_longest_edge(height, width, min(size["longest_edge"], MAX_EDGE))
            if "longest_edge" in size
            else (size["height"], size["width"])
        )
        return as_array(resize(resize(frame_HWC, first, resample, backend), (tile, tile), resample, backend))

    return shrink


def _collate(clips: Sequence[_Clip], chosen: Mapping[str, Any], kind: str | None) -> ProcessedBatch:
    """Frames into one float32 array, written once: rescaled, normalised, channels first."""
    shapes = [{frame.shape for frame in clip.frames} for clip in clips]
    for row, (clip, sizes) in enumerate(zip(clips, shapes, strict=True)):
        if not clip.frames or len(sizes) != 1:
            raise VideoError(f"Video {row} has frames of sizes {sorted(sizes)}; all must have one size.")
    channels = {frame.shape[2] for clip in clips for frame in clip.frames}
    if len(channels) != 1:
        raise VideoError(f"Videos of {sorted(channels)} channels in one batch; leave do_convert_rgb on.")
    maps = {unit: _pixel_map(chosen, unit) for unit in {clip.unit for clip in clips}}
    if chosen["do_normalize"]:
        check_channels(min(channels), chosen["image_mean"], chosen["image_std"])
    lengths = [len(clip.frames) for clip in clips]
    heights, widths = ([clip.frames[0].shape[axis] for clip in clips] for axis in (0, 1))
    equal = len({(clip.frames[0].shape, len(clip.frames)) for clip in clips}) == 1
    if not chosen["do_pad"] and not equal and kind is not None:
        raise ConfigurationError("The videos differ in length or size; leave do_pad on, or return_tensors out.")
    plain = all(each.is_identity for each in maps.values())
    kept = {clip.frames[0].dtype for clip in clips} if plain else {np.dtype(np.float32)}
    dtype = kept.pop() if len(kept) == 1 else np.dtype(np.float32)
    together = chosen["do_pad"] or equal
    shape = (len(clips), max(lengths), min(channels), max(heights), max(widths))
    pixels: list[Array] = (
        list((np.empty if equal else np.zeros)(shape, dtype))
        if together
        else [np.empty((n, min(channels), h, w), dtype) for n, h, w in zip(lengths, heights, widths, strict=True)]
    )
    jobs = []
    for clip, out, height, width in zip(clips, pixels, heights, widths, strict=True):
        jobs += [(maps[clip.unit], frame, out[place, :, :height, :width]) for place, frame in enumerate(clip.frames)]
    in_threads(lambda job: job[0].write(job[1], job[2]), jobs, available_threads())
    data: dict[str, Any] = {"pixel_values": _as_kind(pixels, kind)}
    if chosen["do_pad"]:
        data["pixel_attention_mask"] = _as_kind(_masks(lengths, heights, widths, shape), kind)
    return ProcessedBatch(data)


def _pixel_map(chosen: Mapping[str, Any], unit: bool = False) -> PixelMap:
    normalize = chosen["do_normalize"]
    return PixelMap.build(
        chosen["backend"],
        rescale_factor=chosen["rescale_factor"] if chosen["do_rescale"] else None,
        mean=chosen["image_mean"] if normalize else None,
        std=chosen["image_std"] if normalize else None,
        floats_to_one=unit,
    )


def _masks(
    lengths: Sequence[int], heights: Sequence[int], widths: Sequence[int], shape: tuple[int, ...]
) -> list[Array]:
    """1 where a frame has pixels; where all frames are whole, one value a frame, repeated without memory."""
    whole = min(heights) == shape[3] and min(widths) == shape[4]
    if whole:
        present = (np.arange(shape[1])[None] < np.asarray(lengths)[:, None]).astype(np.int64)
        return list(np.broadcast_to(present[..., None, None], (shape[0], shape[1], *shape[3:])))
    masks = np.zeros((shape[0], shape[1], *shape[3:]), np.int64)
    for mask, length, height, width in zip(masks, lengths, heights, widths, strict=True):
        mask[:length, :height, :width] = 1
    return list(masks)


def _as_kind(rows: list[Array], kind: str | None) -> Any:
    if kind is None:
        return [_tensor(row) for row in rows]
    base = rows[0].base
    whole = base if base is not None and base.shape == (len(rows), *rows[0].shape) else np.stack(rows)
    return whole if kind == "np" else _tensor(whole)


def _tensor(array: Array) -> torch.Tensor:
    # A repeated mask is not writable, which torch would warn about; torch repeats it itself.
    if array.flags.writeable:
        return torch.from_numpy(array)
    small = torch.from_numpy(array[..., 0, 0].copy())
    return small[..., None, None].expand(array.shape)


def _known_metadata(given: Any, videos: int) -> list[VideoMetadata | None]:
    if given is None:
        return [None] * videos
    entries = list(given) if isinstance(given, list | tuple) else [given]
    flat = [one for entry in entries for one in (entry if isinstance(entry, list | tuple) else [entry])]
    if len(flat) != videos:
        raise VideoError(f"{videos} video(s) came with {len(flat)} video_metadata; pass one entry a video.")
    names = {field.name for field in dataclasses.fields(VideoMetadata)}
    made: list[VideoMetadata | None] = []
    for entry in flat:
        if entry is None:
            made.append(None)
        elif not isinstance(entry, Mapping) or "total_num_frames" not in entry or not set(entry) <= names:
            raise VideoError(f"video_metadata must hold total_num_frames and may hold {sorted(names)}, got {entry!r}.")
        else:
            made.append(VideoMetadata(**dict(entry)))
    return made


def _guessed_metadata(frames: Sequence[Frame]) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=len(frames),
        height=frames[0].shape[0],
        width=frames[0].shape[1],
        frames_indices=list(range(len(frames))),
    )


def _is_file(item: Any) -> bool:
    return isinstance(item, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(item, "read")


def _check_names(names: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"SmolVLMVideoProcessor has no option {name!r}. Known: {', '.join(sorted(known))}."
            )


def _form(name: str, value: Any) -> Any:
    """One option in the form in which it is kept and saved."""
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name} is {value!r}; it is True or False.")
        return value
    if name in ("fps", "num_frames", "skip_secs"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and (not number or value < 0 or (value == 0 and name != "skip_secs")):
            raise ConfigurationError(f"{name} is {value!r}; it is a positive number.")
        return value
    return standard_form(name, value)
