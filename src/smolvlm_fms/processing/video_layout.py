"""What a caller means by ``videos``: one or several, as files, frames, arrays or tensors, in any nesting."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from smolvlm_fms.errors import VideoError
from smolvlm_fms.processing.pixels import _to_range

__all__ = ["nest_videos", "split_frames"]

Array: TypeAlias = npt.NDArray[Any]
_CHANNELS = (1, 3, 4)


def nest_videos(videos: Any) -> list[Any]:
    """A flat list of videos, each a file (path, URL, bytes, open file), a list of frames, or a four-axis array.

    A list of Pillow images or three-axis arrays is one video; a list of files is several; a list of files two levels
    further down (``[[["1.png", "2.png"]]]``, as chats nest them) is one video of picture files.

    Raises VideoError where nothing is passed or an item is no video.
    """
    flat = _flatten(videos)
    if not flat:
        raise VideoError("There is no video here; leave `videos` out for text or pictures alone.")
    return flat


def split_frames(video: Array | torch.Tensor, *, rgb: bool, order: str | None) -> tuple[list[Array], bool]:
    """Frames (H, W, C) of an array (T, C, H, W) or (T, H, W, C), views where possible; and whether floats run to 1.

    rgb: greyscale is repeated and alpha laid on white; order: ``"channels_first"``, ``"channels_last"`` or None.
    """
    array = _as_numpy(video)
    if array.ndim != 4 or 0 in array.shape:
        raise VideoError(f"An array of shape {array.shape} is no video; pass (T, C, H, W) or (T, H, W, C).")
    array_THWC = array.transpose(0, 2, 3, 1) if _order(array.shape, order) == "channels_first" else array
    if array_THWC.shape[3] not in _CHANNELS:
        raise VideoError(f"{array_THWC.shape[3]} channels (shape {array.shape}); 1, 3 and 4 are known.")
    array_THWC, unit = _to_range(array_THWC)
    if rgb and array_THWC.shape[3] == 1:
        array_THWC = np.broadcast_to(array_THWC, (*array_THWC.shape[:3], 3))
    if rgb and array_THWC.shape[3] == 4:
        return [_on_white(frame, 1.0 if unit else 255.0) for frame in array_THWC], unit
    return list(array_THWC), unit


def _flatten(videos: Any) -> list[Any]:
    if _is_frame_list(videos) or not isinstance(videos, list | tuple):
        return _single(videos)
    if _nests_files(videos):
        return [list(files) if isinstance(files, list | tuple) else files for group in videos for files in group]
    return [video for item in videos for video in _flatten(item)]


def _on_white(frame_HWC: Array, white: float) -> Array:
    alpha = frame_HWC[..., 3:] / white
    mixed = alpha * frame_HWC[..., :3] + (1.0 - alpha) * white
    return np.rint(mixed).astype(np.uint8) if frame_HWC.dtype == np.uint8 else mixed.astype(np.float32)


def _order(shape: tuple[int, ...], order: str | None) -> str:
    if order is not None:
        return order
    first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
    if first and last:
        raise VideoError(
            f"A video of shape {shape} may be channels first or channels last. Pass input_data_format="
            "'channels_first' or 'channels_last'."
        )
    if not first and not last:
        raise VideoError(f"A video of shape {shape} has no axis of 1, 3 or 4 channels, neither second nor last.")
    return "channels_first" if first else "channels_last"


def _single(video: Any) -> list[Any]:
    if isinstance(video, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(video, "read"):
        return [video]
    if isinstance(video, list | tuple):
        return [list(video)]
    if isinstance(video, Image.Image):
        return [[video]]
    if isinstance(video, np.ndarray | torch.Tensor):
        if video.ndim == 5:
            return list(video)
        if video.ndim in (3, 4):
            return [video if video.ndim == 4 else video[None]]
        raise VideoError(f"An array of shape {tuple(video.shape)} is no video; pass (T, C, H, W) or (T, H, W, C).")
    raise VideoError(
        f"A video cannot be made from {type(video).__name__}. Pass a path, URL, bytes, a list of frames, or an array "
        "or tensor of (T, C, H, W) or (T, H, W, C)."
    )


def _is_frame_list(videos: Any) -> bool:
    return isinstance(videos, list | tuple) and bool(videos) and all(_is_frame(item) for item in videos)


def _is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim in (2, 3))


def _nests_files(videos: Any) -> bool:
    """Groups of lists of files, the first of which is a list of frames."""
    groups = [group for group in videos if isinstance(group, list | tuple) and group]
    return bool(groups) and any(
        isinstance(files, list | tuple) and files and all(isinstance(file, str | os.PathLike) for file in files)
        for group in groups
        for files in group
    )


def _as_numpy(video: Array | torch.Tensor) -> Array:
    if isinstance(video, torch.Tensor):
        tensor = video.detach().cpu()
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    return np.asarray(video)
