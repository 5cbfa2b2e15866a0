"""Pixels, masks, grids and files against transformers' Pillow back end: equal to the last bit."""

from __future__ import annotations

import importlib
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from smolvlm_fms.processing import SmolVLMImageProcessor
from smolvlm_fms.processing.geometry import plan_tiles

try:  # transformers 5
    peer = importlib.import_module("transformers.models.smolvlm.image_processing_pil_smolvlm")
    PeerProcessor = peer.SmolVLMImageProcessorPil
    TRANSFORMERS_5 = True
except ImportError:
    peer = importlib.import_module("transformers.models.smolvlm.image_processing_smolvlm")
    PeerProcessor = peer.SmolVLMImageProcessor
    TRANSFORMERS_5 = False

RELEASED = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
SMALL = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 96}}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a hard edge: both the filter's slopes and its overshoot matter."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[: height // 2, : width // 3] = 255
    return Image.fromarray(pixels)


def assert_same(ours, theirs) -> None:
    assert list(ours) == list(theirs)
    for key in theirs:
        if isinstance(theirs[key], torch.Tensor):
            assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape
            assert torch.equal(ours[key], theirs[key]), key
        else:
            assert ours[key] == theirs[key], key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_image_splitting": False},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_pad": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27]},
        {"size": {"height": 150, "width": 333}},
        *({"resample": filter_} for filter_ in Image.Resampling),
    ],
    ids=str,
)
def test_every_option(options):
    settings = SMALL | options
    ours, theirs = SmolVLMImageProcessor(**settings), PeerProcessor(**settings)
    images = [picture(120, 170), picture(120, 170, seed=1)]
    for per_call in ({"return_tensors": "pt", "return_row_col_info": True}, {"return_tensors": "np"}):
        expected = theirs(images, **per_call)
        got = ours(images, **per_call)
        assert list(got) == list(expected)
        for key in expected:
            assert np.array_equal(np.asarray(got[key]), np.asarray(expected[key])), key
            assert type(got[key]) is type(expected[key])
            if key in ("pixel_values", "pixel_attention_mask"):
                assert got[key].dtype == expected[key].dtype


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 50), (300, 2), (96, 96), (97, 96), (255, 256), (513, 257), (40, 4000), (700, 1300)], ids=str
)
def test_every_shape_of_picture(size):
    if not TRANSFORMERS_5 and size[0] == 1:
        pytest.skip("transformers 4.57 takes a height of 1 for a channel")
    image = picture(*size)
    for settings in (SMALL, {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}):
        call = {"return_tensors": "pt", "return_row_col_info": True}
        assert_same(SmolVLMImageProcessor(**settings)(image, **call), PeerProcessor(**settings)(image, **call))


def test_the_cap_of_4096():
    settings = {"size": {"longest_edge": 5000}, "max_image_size": {"longest_edge": 700}}
    call = {"return_tensors": "pt", "return_row_col_info": True}
    image = picture(16, 200)
    assert_same(SmolVLMImageProcessor(**settings)(image, **call), PeerProcessor(**settings)(image, **call))


def test_the_released_size_on_a_photograph():
    image = picture(1500, 2000)
    call = {"return_tensors": "pt", "return_row_col_info": True}
    assert_same(SmolVLMImageProcessor(**RELEASED)(image, **call), PeerProcessor(**RELEASED)(image, **call))


def test_ragged_batches_with_a_sample_of_no_pictures():
    batch = [[], [picture(40, 80)], [picture(300, 200), picture(96, 96)]]
    call = {"return_tensors": "pt", "return_row_col_info": True}
    ours, theirs = SmolVLMImageProcessor(**SMALL)(batch, **call), PeerProcessor(**SMALL)(batch, **call)
    assert_same(ours, theirs)
    assert not ours["pixel_attention_mask"][0].any() and not ours["pixel_values"][0].any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBA"])
def test_pillow_modes(mode):
    image = picture(60, 90)
    if mode == "RGBA":
        image = image.copy()
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image = image.convert(mode)
    if not TRANSFORMERS_5:
        pytest.skip("transformers 4.57 resizes before it converts: palettes as indices, CMYK not at all")
    call = {"return_tensors": "pt"}
    assert_same(SmolVLMImageProcessor(**SMALL)(image, **call), PeerProcessor(**SMALL)(image, **call))


@pytest.mark.parametrize("layout", ["HWC", "CHW", "grey", "RGBA"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays(layout, kind):
    if layout in ("grey", "RGBA") and not TRANSFORMERS_5:
        pytest.skip("transformers 4.57 treats these arrays another way")
    array = np.array(picture(60, 90))
    if layout == "grey":
        array = array[None, ..., 0].copy()
    elif layout == "RGBA":
        array = np.concatenate([array, array[..., :1]], axis=2)
    elif layout == "CHW":
        array = array.transpose(2, 0, 1).copy()
    image = array if kind == "numpy" else torch.from_numpy(array)
    call = {"return_tensors": "pt"}
    assert_same(SmolVLMImageProcessor(**SMALL)(image, **call), PeerProcessor(**SMALL)(image, **call))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats(dtype):
    whole = np.array(picture(60, 90))
    ours, theirs = SmolVLMImageProcessor(**SMALL), PeerProcessor(**SMALL)
    assert_same(ours(whole.astype(dtype), return_tensors="pt"), theirs(whole.astype(dtype), return_tensors="pt"))
    if not TRANSFORMERS_5:
        pytest.skip("transformers 4.57 makes bytes of floats in 0…1 and then does not rescale them")
    unit = (whole / 255.0).astype(dtype)
    call = {"return_tensors": "pt", "do_rescale": False}
    assert_same(ours(unit, **call), theirs(unit, **call))
    # Without do_rescale=False transformers rescales twice; here it is the picture that was meant.
    assert torch.equal(ours(unit, return_tensors="pt").pixel_values, ours(unit, **call).pixel_values)


def test_a_path_with_exif_orientation(tmp_path):
    image = picture(60, 90)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    call = {"return_tensors": "pt", "return_row_col_info": True}
    path = str(tmp_path / "turned.png")
    assert_same(SmolVLMImageProcessor(**SMALL)(path, **call), PeerProcessor(**SMALL)(path, **call))


@pytest.mark.parametrize(("edge", "tile"), [(2048, 512), (1456, 364), (1536, 384), (5000, 384)])
def test_geometry_over_sizes_1_to_5000(edge, tile):
    """The plan against transformers' own two functions, on a coarse grid over the whole square."""
    sides = sorted({1, 2, 3, 5, *range(7, 5001, 83), 511, 512, 513, 2047, 2048, 2049, 4096, 4097, 5000})

    class Sized:
        """Only a shape: what transformers' size arithmetic looks at."""

        def __init__(self, height: int, width: int) -> None:
            self.shape = (3, height, width)

    class Recorder(PeerProcessor):
        def resize(self, image, size, **unused):
            size = dict(size)
            if "longest_edge" in size:
                h, w = peer._resize_output_size_rescale_to_max_len(*image.shape[-2:], max_len=size["longest_edge"])
                return Sized(*peer._resize_output_size_scale_below_upper_bound(h, w, max_len=peer.MAX_IMAGE_SIZE))
            return Sized(size["height"], size["width"])

    recorder = Recorder()
    extra = {} if TRANSFORMERS_5 else {"input_data_format": "channels_first"}
    for height in sides:
        for width in sides:
            plan = plan_tiles(height, width, size=edge, tile=tile)
            first = recorder.resize(Sized(height, width), {"longest_edge": edge})
            assert plan.resized == first.shape[-2:], (height, width)
            if TRANSFORMERS_5:
                second = recorder.resize_for_vision_encoder(first, tile)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    monkey = {"get_image_size": lambda image, channel_dim=None: image.shape[-2:]}
                    saved = {name: getattr(peer, name) for name in monkey}
                    for name, value in monkey.items():
                        setattr(peer, name, value)
                    try:
                        second = recorder.resize_for_vision_encoder(first, tile, **extra)
                    finally:
                        for name, value in saved.items():
                            setattr(peer, name, value)
            assert plan.canvas == second.shape[-2:], (height, width)
            rows, cols = second.shape[-2] // tile, second.shape[-1] // tile
            assert (plan.rows, plan.cols) == ((0, 0) if rows * cols == 1 else (rows, cols))


@pytest.mark.parametrize("backend", ["pil", "torch"])
def test_transformers_reads_what_is_saved(tmp_path, backend):
    options = SMALL | {"image_mean": [0.4, 0.5, 0.6], "do_image_splitting": False, "backend": backend}
    ours = SmolVLMImageProcessor(**options)
    ours.save_pretrained(tmp_path)
    choice = {"backend": "pil"} if TRANSFORMERS_5 else {"use_fast": False}
    theirs = AutoImageProcessor.from_pretrained(tmp_path, **choice)
    assert type(theirs).__name__.startswith("SmolVLMImageProcessor")
    assert dict(theirs.size) == ours.size and dict(theirs.max_image_size) == ours.max_image_size
    assert list(theirs.image_mean) == ours.image_mean and theirs.do_image_splitting is False
    again = SmolVLMImageProcessor.from_pretrained(tmp_path)
    assert repr(again) == repr(ours)


def test_we_read_what_transformers_saves(tmp_path):
    theirs = PeerProcessor(**SMALL, do_image_splitting=False, resample=3)
    theirs.save_pretrained(tmp_path)
    ours = SmolVLMImageProcessor.from_pretrained(tmp_path)
    call = {"return_tensors": "pt"}
    assert_same(ours(picture(60, 90), **call), theirs(picture(60, 90), **call))
    # transformers 5 saves whole processors with the image processor inside.
    nested = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested, "image_seq_len": 64}))
    assert repr(SmolVLMImageProcessor.from_pretrained(tmp_path)) == repr(ours)
