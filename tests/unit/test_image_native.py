"""The compiled resize against Pillow itself, bit for bit, and the way back to Pillow where it is missing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm_fms.processing import native
from smolvlm_fms.processing.image import SmolVLMImageProcessor
from smolvlm_fms.processing.resample import _has_8bit_bilinear, _splits, _torch_mode, resize
from smolvlm_fms.processing.tiling import ByteTiles, PixelMap

FILTERS = [each for each in Image.Resampling if native.can_resize(3, each)]
built = pytest.mark.skipif(not FILTERS, reason="THE COMPILED RESIZE IS NOT BUILT: install with a C compiler")


def pillow(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    resized = np.asarray(Image.fromarray(flat).resize((size[1], size[0]), resample))
    return resized.reshape(*size, pixels.shape[2])


@built
@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 130), st.integers(1, 130)),
    st.sampled_from([1, 3]),
    st.sampled_from(FILTERS or list(Image.Resampling)),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_same_bytes_as_pillow(source, target, channels, resample, threads, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*source, channels), dtype=np.uint8)
    if seed == 0:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)  # the filters' overshoot is clipped in both passes
    assert np.array_equal(native.resize(pixels, target, resample, threads), pillow(pixels, target, resample))


@built
@pytest.mark.parametrize("resample", FILTERS, ids=lambda each: each.name)
def test_at_the_sizes_of_photographs(resample):
    pixels = np.random.default_rng(1).integers(0, 256, (601, 1203, 3), dtype=np.uint8)
    for size in ((768, 1536), (512, 512), (601, 400), (37, 1203)):
        assert np.array_equal(native.resize(pixels, size, resample, 2), pillow(pixels, size, resample))


@built
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(150, 200), (301, 90), (40, 402), (301, 402)])
def test_a_pillow_image_is_read_in_bands(mode, size):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (301, 402, 3), dtype=np.uint8)).convert(mode)
    resized = native.resize(image, size, Image.Resampling.LANCZOS, 2)
    expected = np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))
    assert np.array_equal(resized, expected.reshape(resized.shape))


@pytest.mark.parametrize("name", ["BILINEAR", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torch_gives_the_same_on_several_threads(name, channels):
    """Rows in bands, from arrays and Pillow images; as the tensor back end of transformers, which takes them whole."""
    mode = _torch_mode(Image.Resampling[name])
    if mode == "bilinear" and not _has_8bit_bilinear():
        pytest.skip("THIS PROCESSOR RESIZES IN FLOATS: both passes are rounded once, and stay together")
    assert _splits(mode), "this torch has another arithmetic, or another order of its passes"
    pixels = np.random.default_rng(4).integers(0, 256, (1301, 402, channels), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    for size in ((650, 201), (1400, 300), (1301, 500), (700, 402)):
        whole = resize(pixels, size, Image.Resampling[name], "torch")
        for source in (pixels, image, pixels[:, ::-1][:, ::-1]):
            split = resize(source, size, Image.Resampling[name], "torch", 3)
            assert split.dtype == np.uint8 and np.array_equal(split, whole)


@built
@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5, None])
def test_tables_give_what_arithmetic_gives(backend, factor):
    steps = PixelMap.build(backend, rescale_factor=factor, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    canvas = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    tile = canvas[3:35, 5:37]
    fast, slow = np.empty((3, 32, 32), np.float32), np.empty((3, 32, 32), np.float32)
    assert native.can_write(tile) and not native.can_write(tile.transpose(1, 0, 2))
    steps.write(tile, fast)
    steps._write(tile, slow)
    assert np.array_equal(fast, slow)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
)
def test_tiles_of_bytes_become_the_same_floats(settings, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "_library", lambda: None)
    sizes = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    processor = SmolVLMImageProcessor(**sizes, **settings)
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (70, 110, 3), dtype=np.uint8))
    floats = processor(image, return_tensors="pt")["pixel_values"][0]
    plain = processor(image, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0]
    tiles = ByteTiles(plain, processor.pixel_map)
    assert plain.dtype == torch.uint8 and floats.dtype == torch.float32 and tiles.nbytes * 4 == floats.nbytes
    assert len(tiles) == len(floats) > 1 and torch.equal(tiles[:], floats) and torch.equal(tiles[1:3], floats[1:3])


def test_without_it_pillow_gives_the_same_batch(tmp_path):
    script = """
import sys, numpy as np
from smolvlm_fms.processing import SmolVLMImageProcessor
images = [np.random.default_rng(seed).integers(0, 256, (50 + seed, 71, 3), dtype=np.uint8) for seed in range(3)]
processor = SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 48})
np.save(sys.argv[1], processor(images, return_tensors="np").pixel_values)
"""
    for switch in ("0", "1"):
        environment = {"SMOLVLM_NATIVE_RESIZE": switch, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / switch)], check=True, env=environment)
    assert np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
