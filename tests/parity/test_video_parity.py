"""Videos against transformers: sampling and decoding wherever tests run, pixels where torchvision is on the path.

    PYTHONPATH=.peers/torchvision python -m pytest -p tests.torchvision_ops tests/parity/test_video_parity.py

``SMOLVLM_REQUIRE_TORCHVISION=1`` makes its absence a failure instead of a skip.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import video_utils

from smolvlm_fms.processing.processor import SmolVLMProcessor
from smolvlm_fms.processing.video import SmolVLMVideoProcessor, sample_frame_indices
from smolvlm_fms.processing.video_decode import VideoMetadata, decode_video
from tests import torchvision_ops
from tests.tiny import build_processor_files
from tests.videos import make_video

MAJOR = int(transformers.__version__.split(".")[0])
TORCHVISION = torchvision_ops.available()
if not TORCHVISION and os.environ.get("SMOLVLM_REQUIRE_TORCHVISION"):
    raise RuntimeError("TORCHVISION IS NOT ON THE PATH: videos' pixels would not be compared")
needs_torchvision = pytest.mark.skipif(
    not TORCHVISION,
    reason="TORCHVISION IS NOT ON THE PATH: videos' pixels are NOT compared (see this file's docstring)",
)
SETTINGS: dict[str, Any] = {
    "video_sampling": {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 64}},
    "max_image_size": {"longest_edge": 32},
}
# transformers 4 takes bicubic where Lanczos is asked for.
STAND_IN = {} if MAJOR >= 5 else {"resample": Image.Resampling.BICUBIC}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(*shape: int) -> np.ndarray:
    return np.linspace(20, 235, int(np.prod(shape))).reshape(shape).astype(np.uint8)


@given(frames=st.integers(1, 4000), fps=st.sampled_from([1.0, 10.0, 23.976, 25.0, 30.0, 59.94]),
       most=st.integers(1, 64), rate=st.sampled_from([0.5, 1, 2, 5]), skip=st.sampled_from([0, 1, 2.5]))  # fmt: skip
def test_the_same_frames_are_sampled(frames: int, fps: float, most: int, rate: float, skip: float) -> None:
    peer = pytest.importorskip("transformers.models.smolvlm.video_processing_smolvlm").SmolVLMVideoProcessor
    duration = frames / fps
    theirs = video_utils.VideoMetadata(total_num_frames=frames, fps=fps, duration=duration)
    method = getattr(peer, "sample_frames", None)
    if method is None:
        pytest.skip("this transformers hides the class without torchvision")
    expected = method(SimpleNamespace(num_frames=None, fps=None), theirs, num_frames=most, fps=rate, skip_secs=skip)
    ours = VideoMetadata(total_num_frames=frames, fps=fps, duration=duration)
    assert sample_frame_indices(ours, most, rate, skip).tolist() == list(expected)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("mov", "mpeg4")])
def test_the_same_frames_are_decoded(tmp_path: Path, container: str, codec: str) -> None:
    (tmp_path / "film").write_bytes(make_video(24, container=container, codec=codec, left_half=40))
    wanted = [0, 3, 11, 20, 23]
    frames, ours = decode_video(tmp_path / "film", lambda known: wanted)
    expected, theirs = video_utils.load_video(
        str(tmp_path / "film"), backend="pyav", sample_indices_fn=lambda metadata, **_: np.asarray(wanted)
    )
    assert np.array_equal(np.stack(frames), expected)
    for name in ("total_num_frames", "fps", "duration"):
        assert float(ours[name]) == pytest.approx(float(getattr(theirs, name))), name


VIDEOS: dict[str, Any] = {
    "bytes, channels last": noise(6, 40, 50, 3),
    "bytes, channels first": noise(6, 3, 50, 40),
    "a tensor": torch.from_numpy(noise(3, 3, 70, 31)),
    "floats to 255": torch.from_numpy(noise(3, 3, 40, 50)).float(),
    "greyscale": noise(2, 1, 40, 50),
    "frames": [Image.fromarray(frame) for frame in noise(4, 30, 77, 3)],
    "a batch": noise(2, 4, 3, 70, 130),
    "two of a length": [noise(3, 3, 70, 130), noise(3, 3, 33, 20)],
    "one picture": noise(40, 50, 3),
    "nested": [[noise(2, 3, 9, 40)], [noise(2, 3, 9, 40, seed=1)]],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "no rescale": {"do_rescale": False}, "no normalise": {"do_normalize": False},
    "bytes": {"do_rescale": False, "do_normalize": False}, "bilinear": {"resample": Image.Resampling.BILINEAR},
    "bicubic": {"resample": 3}, "as it is": {"do_resize": False}, "exact": {"size": {"height": 20, "width": 30}},
    "lists": {"return_tensors": None}, "unpadded": {"return_tensors": None, "do_pad": False},
    "other means": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
}  # fmt: skip


if MAJOR < 5:
    VIDEOS.pop("a batch")  # five axes are unknown there


@needs_torchvision
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("video", VIDEOS)
def test_the_same_pixels(video: str, options: str) -> None:
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor as Peer

    call = {"return_tensors": "pt", **OPTIONS[options]}
    if MAJOR < 5 and (video, options) == ("two of a length", "as it is"):
        pytest.skip("transformers 4 cannot pad videos")
    theirs = Peer(**copy.deepcopy(SETTINGS))(copy.deepcopy(VIDEOS[video]), **call)
    ours = SmolVLMVideoProcessor(**SETTINGS, **STAND_IN)(VIDEOS[video], **call)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        rows = [expected] if isinstance(expected, torch.Tensor) else expected
        got_rows = [ours[name]] if isinstance(expected, torch.Tensor) else ours[name]
        for got, row in zip(got_rows, rows, strict=True):
            assert got.shape == row.shape and (got.dtype == row.dtype or name == "pixel_attention_mask"), name
            assert torch.equal(got, row.to(got.dtype)), (name, (got.float() - row.float()).abs().max())


@needs_torchvision
@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 cannot pad videos")
def test_a_ragged_batch_differs_in_the_mask_alone() -> None:
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor as Peer

    videos = [noise(4, 3, 70, 130), noise(6, 3, 33, 31)]
    theirs = Peer(**copy.deepcopy(SETTINGS))(videos, return_tensors="pt")
    ours = SmolVLMVideoProcessor(**SETTINGS, **STAND_IN)(videos, return_tensors="pt")
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    assert ours.pixel_attention_mask[0, 4:].sum() == 0 and bool(ours.pixel_attention_mask[1].all())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmolVLMProcessor, Any]:
    from transformers import AutoProcessor

    folder = build_processor_files(tmp_path_factory.mktemp("pair"), padding_side="left", video_edge=128)
    backend = "torch" if MAJOR >= 5 else "torch4"
    theirs = AutoProcessor.from_pretrained(folder)
    ours = SmolVLMProcessor.from_pretrained(folder, backend=backend)
    ours.video_processor = SmolVLMVideoProcessor.from_pretrained(folder, **STAND_IN)
    return ours, theirs


@needs_torchvision
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_whole_dictionaries_with_videos(pair: tuple[SmolVLMProcessor, Any], frames: int) -> None:
    ours, theirs = pair
    metadata = {"total_num_frames": 40, "fps": 10.0, "duration": 4.0, "frames_indices": list(range(0, 40, 8))[:frames]}
    for known in (None, [metadata, metadata]):
        call: dict[str, Any] = {
            "text": ["<video>What?", "So<video>"], "videos": [[noise(frames, 3, 40, 50)], [noise(frames, 3, 50, 20)]],
            "padding": True, "return_tensors": "pt", "video_metadata": copy.deepcopy(known),
        }  # fmt: skip
        got = ours(**copy.deepcopy(call))
        expected = theirs(**call)
        assert set(got) == set(expected) - {"token_type_ids"}
        assert all(torch.equal(got[name], expected[name].to(got[name].dtype)) for name in got)


@needs_torchvision
def test_conversations_with_videos(pair: tuple[SmolVLMProcessor, Any]) -> None:
    ours, theirs = pair
    parts = [{"type": "video", "video": smooth(3, 3, 40, 50)}, {"type": "text", "text": "What happens?"}]
    conversation = [{"role": "user", "content": parts}]
    call: dict[str, Any] = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    got = ours.apply_chat_template(conversation, do_sample_frames=False, **call)
    expected = theirs.apply_chat_template(conversation, do_sample_frames=False, **call)
    assert set(got) == set(expected) - {"token_type_ids"}
    assert all(torch.equal(got[name], expected[name].to(got[name].dtype)) for name in got)


@needs_torchvision
def test_what_we_save_they_read(pair: tuple[SmolVLMProcessor, Any], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    ours, theirs = pair
    ours.save_pretrained(tmp_path / "ours")
    again = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(again).__name__ == "SmolVLMProcessor" and again.chat_template == theirs.chat_template
    assert (again.video_processor.fps, again.video_processor.num_frames, again.image_seq_len) == (1, 8, 4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = SmolVLMProcessor.from_pretrained(tmp_path / "theirs")
    assert back.video_processor is not None and ours.video_processor is not None
    assert back.video_processor.to_dict() == ours.video_processor.to_dict() | {"resample": 1}
    assert back.image_seq_len == 4 and back.chat_template == ours.chat_template
