"""Decoding, sampling and laying out videos, without a peer."""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm_fms.errors import ConfigurationError, FetchError, MissingDependencyError, VideoError
from smolvlm_fms.processing.video import SmolVLMVideoProcessor, sample_frame_indices
from smolvlm_fms.processing.video_decode import VideoMetadata, decode_video, probe_video
from smolvlm_fms.processing.video_layout import nest_videos
from tests.tiny import build_processor_files
from tests.videos import greys, make_sound, make_video

SETTINGS: dict[str, Any] = {
    "video_sampling": {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 64}},
    "max_image_size": {"longest_edge": 32},
}
FORMATS = [
    ("mp4", "libx264"), ("matroska", "libx264"), ("mpegts", "libx264"), ("h264", "libx264"), ("avi", "mpeg4"),
    ("mov", "mpeg4"), ("webm", "libvpx-vp9"),
]  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> SmolVLMVideoProcessor:
    return SmolVLMVideoProcessor(**SETTINGS)


@pytest.fixture(scope="module")
def film() -> bytes:
    return make_video(30, fps=10, gop=7)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Decoding


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_the_frames_asked_for_come_back(container: str, codec: str) -> None:
    data = make_video(24, container=container, codec=codec)
    wanted = [0, 1, 5, 13, 22]
    frames, metadata = decode_video(data, lambda known: wanted)
    assert greys(frames) == wanted
    assert metadata.total_num_frames == 24 and list(metadata.frames_indices) == wanted
    if container != "h264":  # a bare stream has no clock
        assert metadata.fps == pytest.approx(10, rel=1e-3) and metadata.duration == pytest.approx(2.4, rel=1e-3)
    assert (metadata.width, metadata.height) == (64, 48) and frames[0].shape == (48, 64, 3)


@given(wanted=st.sets(st.integers(0, 29), min_size=1, max_size=12).map(sorted))
def test_any_choice_of_frames(film: bytes, wanted: list[int]) -> None:
    frames, _ = decode_video(film, lambda known: wanted)
    assert greys(frames) == wanted


def test_every_way_to_name_a_file(film: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a film.mp4"
    path.write_bytes(film)
    uri = "data:video/mp4;base64," + base64.b64encode(film).decode()
    with path.open("rb") as opened:
        for source in (path, str(path), f"file://{path}", film, bytearray(film), io.BytesIO(film), opened, uri):
            assert probe_video(source).total_num_frames == 30
    assert len(decode_video(path)[0]) == 30


def test_a_variable_frame_rate() -> None:
    data = make_video(6, times=[0, 1, 2, 10, 20, 40], fps=10)
    frames, metadata = decode_video(data, lambda known: [0, 3, 5])
    assert greys(frames) == [0, 3, 5]
    assert metadata.total_num_frames == 6 and metadata.duration == pytest.approx(4.1, abs=0.2)
    assert metadata.fps == pytest.approx(6 / metadata.duration)


@pytest.mark.parametrize(("rotation", "corner"), [(90, "bottom"), (-90, "top"), (180, "right")])
def test_a_turned_camera(rotation: int, corner: str) -> None:
    data = make_video(3, size=(64, 48), step=0, left_half=255, rotation=rotation)
    frames, metadata = decode_video(data)
    height, width = frames[0].shape[:2]
    assert (width, height) == ((64, 48) if rotation == 180 else (48, 64)) == (metadata.width, metadata.height)
    halves = {
        "top": frames[0][: height // 2 - 4],
        "bottom": frames[0][height // 2 + 4 :],
        "right": frames[0][:, width // 2 + 4 :],
    }
    bright = {name for name, half in halves.items() if half.mean() > 200}
    assert bright == {corner}


def test_sound_beside_the_picture_is_passed_over() -> None:
    assert greys(decode_video(make_video(5, audio=True))[0]) == [0, 1, 2, 3, 4]


def test_shrinking_happens_frame_by_frame(film: bytes) -> None:
    shapes: list[tuple[int, ...]] = []

    def shrink(frame: np.ndarray) -> np.ndarray:
        shapes.append(frame.shape)
        return frame[::8, ::8]

    frames, _ = decode_video(film, lambda known: [3, 4], shrink=shrink)
    assert shapes == [(48, 64, 3)] * 2 and frames[0].shape == (6, 8, 3)


def test_files_that_are_no_videos(tmp_path: Path, film: bytes) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "BMP")
    for data, message in (
        (b"", "not a video|no frames"),
        (b"not a video at all" * 50, "not a video"),
        (film[:400], "not a video|no frames|cut short"),
        (make_sound(), "no picture stream"),
        (picture.getvalue(), "not a video|no frames"),
    ):
        with pytest.raises(VideoError, match=message):
            decode_video(data)
    with pytest.raises(FetchError, match="no such file"):
        decode_video(tmp_path / "nothing.mp4")
    with pytest.raises(FetchError, match="no such file"):
        decode_video("bad\0name")
    with pytest.raises(VideoError, match="cannot be read from int"):
        decode_video(3)  # type: ignore[arg-type]
    with pytest.raises(VideoError, match="base64"):
        decode_video("data:video/mp4;base64,§§")


def test_a_film_that_was_cut_short_says_so() -> None:
    data = make_video(40, container="matroska", gop=40, size=(160, 120))
    whole, _ = decode_video(data, lambda known: [0, known.total_num_frames - 1])
    assert len(whole) == 2
    frames, metadata = decode_video(data[: len(data) * 2 // 3])
    assert 0 < metadata.total_num_frames < 40 and len(frames) == metadata.total_num_frames


def test_a_video_of_no_length() -> None:
    buffer = io.BytesIO()
    import av

    with av.open(buffer, "w", format="matroska") as output:
        stream: Any = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        output.start_encoding()
    with pytest.raises(VideoError, match=r"no frames|not a video"):
        decode_video(buffer.getvalue())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_films_never_crash(film: bytes, data: st.DataObject) -> None:
    damaged = bytearray(film)
    for _ in range(data.draw(st.integers(1, 20))):
        damaged[data.draw(st.integers(0, len(film) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(film)))
    try:
        frames, metadata = decode_video(bytes(damaged[:cut] if data.draw(st.booleans()) else damaged))
    except VideoError:
        return
    assert len(frames) == metadata.total_num_frames


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n"]
)
def test_scripts_that_name_other_files_are_refused(tmp_path: Path, film: bytes, text: str) -> None:
    (tmp_path / "secret.ts").write_bytes(make_video(3, container="mpegts"))
    script = tmp_path / "list.m3u8"
    script.write_text(text.format(tmp_path / "secret.ts"))
    for source in (script, script.read_bytes()):
        with pytest.raises(VideoError):
            decode_video(source)


def test_frames_that_there_are_not(film: bytes) -> None:
    for wanted in ([], [30], [-1], [3, 2], [1, 1]):
        with pytest.raises(VideoError, match="ascending numbers in 0 … 29"):
            decode_video(film, lambda known, wanted=wanted: wanted)


def test_without_pyav_the_extra_is_named(film: bytes, monkeypatch: pytest.MonkeyPatch, processor: Any) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"smolvlm-fms\[video\]"):
        decode_video(film)
    assert processor(noise(2, 3, 8, 9), return_tensors="pt").pixel_values.shape == (1, 2, 3, 32, 32)


# Sampling


def known(frames: int, fps: float) -> VideoMetadata:
    return VideoMetadata(total_num_frames=frames, fps=fps, duration=frames / fps)


@given(frames=st.integers(1, 5000), fps=st.floats(0.5, 120), most=st.integers(1, 80), rate=st.floats(0.1, 10),
       skip=st.floats(0, 5))  # fmt: skip
def test_sampled_frames_are_few_ascending_and_there(
    frames: int, fps: float, most: int, rate: float, skip: float
) -> None:
    indices = sample_frame_indices(known(frames, fps), most, rate, skip)
    assert 1 <= len(indices) <= min(most, frames) or len(indices) == 1
    assert (np.diff(indices) > 0).all() and indices[0] >= 0 and indices[-1] < frames


def test_sampling_by_hand() -> None:
    assert sample_frame_indices(known(100, 10), 64, 1).tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert sample_frame_indices(known(100, 10), 5, 1).tolist() == [10, 30, 50, 70, 90]  # a second left out at both ends
    assert sample_frame_indices(known(100, 10), 5, 1, skip_secs=0).tolist() == [0, 24, 49, 74, 99]
    assert sample_frame_indices(known(3, 10), 64, 1).tolist() == [0]
    with pytest.raises(VideoError, match="fps and duration"):
        sample_frame_indices(VideoMetadata(total_num_frames=5), 4, 1)


def test_a_file_is_sampled_as_configured(processor: SmolVLMVideoProcessor) -> None:
    data = make_video(40, fps=10)
    batch = processor(data, do_sample_frames=True, return_metadata=True, return_tensors="pt")
    assert batch.pixel_values.shape == (1, 4, 3, 32, 32)
    assert batch.video_metadata[0].timestamps == pytest.approx([0, 1.3, 2.6, 3.9])
    assert batch.video_metadata[0].sampled_fps == pytest.approx(1)
    more = processor(data, do_sample_frames=True, fps=5, num_frames=6, skip_secs=0, return_tensors="pt")
    assert more.pixel_values.shape[1] == 6
    with pytest.raises(VideoError, match="Sampling needs fps and num_frames"):
        SmolVLMVideoProcessor()(data, do_sample_frames=True)


# Layout


def reference(video_TCHW: np.ndarray, edge: int = 64, tile: int = 32) -> torch.Tensor:
    """What the frames should become, written down straight: two antialiased resizes on bytes, then one scaling."""
    frames = torch.from_numpy(video_TCHW)
    height, width = frames.shape[-2:]
    first = (
        (max(int(edge / (width / height)) + int(edge / (width / height)) % 2, 1), edge)
        if width >= height
        else (edge, max(int(edge * (width / height)) + int(edge * (width / height)) % 2, 1))
    )
    for size in (first, (tile, tile)):
        if frames.shape[-2:] != size:
            frames = torch.nn.functional.interpolate(
                frames, size=list(size), mode="lanczos", antialias=True, align_corners=False
            )
    return (frames.float() - 127.5) / 127.5


@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (64, 64), (3, 200), (33, 31), (1, 9)])
def test_pixels_are_those_of_the_straight_way(processor: SmolVLMVideoProcessor, shape: tuple[int, int]) -> None:
    video = noise(3, 3, *shape)
    got = processor(video, input_data_format="channels_first", return_tensors="pt")
    torch.testing.assert_close(got.pixel_values[0], reference(video), atol=1e-6, rtol=0)
    assert got.pixel_attention_mask.dtype == torch.int64 and bool(got.pixel_attention_mask.all())


def test_all_forms_of_one_video_agree(processor: SmolVLMVideoProcessor) -> None:
    # Smooth, so that floats do not overshoot where bytes are clipped.
    video = np.linspace(40, 200, 4 * 3 * 40 * 50).reshape(4, 40, 3, 50).transpose(0, 2, 1, 3).astype(np.uint8)
    last = np.ascontiguousarray(video.transpose(0, 2, 3, 1))
    pictures = [Image.fromarray(frame) for frame in last]
    expected = processor(video, return_tensors="pt").pixel_values
    forms: list[Any] = [
        last, torch.from_numpy(video), [video], video[None], pictures, [pictures], list(last), list(video),
        [[torch.from_numpy(frame) for frame in video]], video.astype(np.float64), tuple(pictures),
    ]  # fmt: skip
    for form in forms:
        torch.testing.assert_close(processor(form, return_tensors="pt").pixel_values, expected, atol=0.009, rtol=0)
    unit = processor(video.astype(np.float32) / 255, return_tensors="pt").pixel_values
    torch.testing.assert_close(unit, expected, atol=0.009, rtol=0)
    assert isinstance(processor(video, return_tensors="np")["pixel_values"], np.ndarray)


def test_frames_from_files_grey_and_transparent(processor: SmolVLMVideoProcessor, tmp_path: Path) -> None:
    files = []
    for index, mode in enumerate(("L", "RGBA", "P")):
        picture = Image.new(mode, (20 + index, 30), 0)
        picture.save(tmp_path / f"{index}.png")
        files.append(str(tmp_path / f"{index}.png"))
    batch = processor([[files]], return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 3, 32, 32)
    assert batch.pixel_values[0, :, 0, 0, 0].tolist() == [-1, 1, -1]  # black, nothing on white, black
    grey = processor(noise(2, 1, 8, 40), return_tensors="pt").pixel_values
    assert torch.equal(grey[:, :, 0], grey[:, :, 2])


def test_a_ragged_batch_pads_with_zeros_and_says_so(processor: SmolVLMVideoProcessor) -> None:
    videos = [noise(2, 3, 40, 50), noise(5, 3, 33, 20)]
    batch = processor(videos, return_tensors="pt", return_metadata=True)
    assert batch.pixel_values.shape == (2, 5, 3, 32, 32)
    assert batch.pixel_attention_mask.flatten(2).any(-1).tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert not batch.pixel_values[0, 2:].any()
    for row, video in enumerate(videos):
        assert torch.equal(batch.pixel_values[row, : len(video)], processor(video, return_tensors="pt").pixel_values[0])
    assert [one.total_num_frames for one in batch.video_metadata] == [2, 5]
    unpadded = processor(videos, do_pad=False)
    assert list(unpadded) == ["pixel_values"] and [len(one) for one in unpadded.pixel_values] == [2, 5]
    with pytest.raises(ConfigurationError, match="do_pad"):
        processor(videos, do_pad=False, return_tensors="pt")
    whole = processor(videos, do_resize=False, return_tensors="pt")
    assert whole.pixel_values.shape == (2, 5, 3, 40, 50)
    assert int(whole.pixel_attention_mask[1].sum()) == 5 * 33 * 20


def test_nesting() -> None:
    video, frame = noise(2, 3, 8, 9), noise(3, 8, 9)
    assert len(nest_videos([video, [video, [video]], []])) == 3
    assert len(nest_videos(["a.mp4", ["b.mp4"]])) == 2
    assert nest_videos([[["1.png", "2.png"], "c.mp4"]]) == [["1.png", "2.png"], "c.mp4"]
    assert len(nest_videos([frame, frame])) == 1 and len(nest_videos([frame, frame])[0]) == 2
    assert nest_videos(frame)[0].shape == (1, 3, 8, 9)
    for nothing in ([], [[]], None, 3, noise(4), [None]):
        with pytest.raises(VideoError):
            nest_videos(nothing)


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (noise(2, 3, 5, 3), {}, "channels first or channels last"),
        (noise(2, 5, 6, 7), {}, "no axis of 1, 3 or 4 channels"),
        (np.zeros((0, 3, 8, 9), np.uint8), {}, "no video"),
        (np.full((1, 3, 8, 9), np.nan), {}, "NaN"),
        (np.full((1, 3, 8, 9), -1.0), {}, "Values run from -1"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], {"do_resize": False}, "all must have one size"),
        (noise(2, 3, 8, 9), {"do_sample_frames": True}, "fps and duration"),
        (noise(2, 3, 8, 9), {"video_metadata": [{"fps": 3}]}, "total_num_frames"),
        (noise(2, 3, 8, 9), {"video_metadata": [{"total_num_frames": 2}] * 2}, "came with 2 video_metadata"),
        (noise(2, 3, 8, 9), {"video_metadata": {"total_num_frames": 90, "fps": 1, "duration": 90},
                             "do_sample_frames": True}, "only 2 were passed"),
        (noise(2, 3, 8, 9), {"video_metadata": {"total_num_frames": 2, "frames_indices": [0]}}, "1 frames_indices"),
    ],
)  # fmt: skip
def test_videos_that_cannot_be_used(processor: SmolVLMVideoProcessor, video: Any, options: dict, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        processor(video, **options)


@pytest.mark.parametrize(
    "options",
    [{"frames": 3}, {"do_resize": "yes"}, {"return_tensors": "tf"}, {"fps": 0}, {"num_frames": -1}, {"size": "big"},
     {"do_center_crop": True}, {"backend": "cv2"}, {"image_std": 0}],
)  # fmt: skip
def test_options_that_cannot_be_used(processor: SmolVLMVideoProcessor, options: dict) -> None:
    with pytest.raises(ConfigurationError):
        processor(noise(2, 3, 8, 9), **options)


# Files


def test_settings_from_all_three_layouts(tmp_path: Path) -> None:
    folder = build_processor_files(tmp_path / "a", video_edge=48, max_frames=5, fps=2)
    first = SmolVLMVideoProcessor.from_pretrained(folder)
    assert (first.fps, first.num_frames, first.size) == (2, 5, {"longest_edge": 128})
    first.save_pretrained(tmp_path / "b")
    again = SmolVLMVideoProcessor.from_pretrained(tmp_path / "b")
    assert again.to_dict() == first.to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": {**first.to_dict(), "fps": 3}}))
    assert SmolVLMVideoProcessor.from_pretrained(tmp_path).fps == 3
    assert SmolVLMVideoProcessor.from_pretrained(tmp_path, fps=4).fps == 4
    with pytest.raises(FetchError):
        SmolVLMVideoProcessor.from_pretrained(tmp_path / "nowhere")


def test_metadata_is_a_mapping() -> None:
    metadata = VideoMetadata(total_num_frames=4, fps=2.0, duration=2.0, frames_indices=[0, 2])
    assert dict(metadata)["fps"] == metadata["fps"] == 2.0 and len(metadata) == 7
    assert metadata.timestamps == [0.0, 1.0] and metadata.sampled_fps == 1.0
    with pytest.raises(KeyError):
        _ = metadata["colour"]
    with pytest.raises(VideoError, match="need both"):
        _ = VideoMetadata(total_num_frames=1).timestamps
    assert list(itertools.islice(metadata, 1)) == ["total_num_frames"]
