"""Pixels against transformers' tensor back end, which needs torchvision: equal to the last bit.

This package never uses torchvision. To run these tests, put one on the path, for this file alone:

    pip install --target .peers/torchvision --no-deps torchvision==0.28.0
    PYTHONPATH=.peers/torchvision python -m pytest -p tests.torchvision_ops tests/parity/test_image_tensor_parity.py

``SMOLVLM_REQUIRE_TORCHVISION=1`` makes its absence a failure instead of a skip.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests import torchvision_ops

if not torchvision_ops.available():
    reason = "TORCHVISION IS NOT ON THE PATH: the tensor back end's parity is NOT tested (see this file's docstring)"
    if os.environ.get("SMOLVLM_REQUIRE_TORCHVISION"):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)

from transformers.models.smolvlm import image_processing_smolvlm as peer

from smolvlm_fms.processing import SmolVLMImageProcessor

TRANSFORMERS_5 = hasattr(peer, "tvF")
if TRANSFORMERS_5:
    PeerProcessor = peer.SmolVLMImageProcessor
else:
    from transformers.models.smolvlm.image_processing_smolvlm_fast import SmolVLMImageProcessorFast as PeerProcessor

SMALL = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 96}}
CALL = {"return_tensors": "pt", "return_row_col_info": True}
BACKEND = "torch" if TRANSFORMERS_5 else "torch4"


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[: height // 2, : width // 3] = 255
    return Image.fromarray(pixels)


def check(images, **options) -> None:
    ours = SmolVLMImageProcessor(**(SMALL | options), backend=BACKEND)(images, **CALL)
    theirs = PeerProcessor(**(SMALL | options))(images, **CALL)
    assert list(ours) == list(theirs)
    for key, expected in theirs.items():
        if isinstance(expected, torch.Tensor):
            if not TRANSFORMERS_5 and key == "pixel_attention_mask":
                expected = expected.long()  # 4.57 made floats of this back end's mask; 5 put it right
            assert ours[key].dtype == expected.dtype and ours[key].shape == expected.shape
            assert torch.equal(ours[key], expected), (key, (ours[key] - expected).abs().max())
        else:
            assert ours[key] == expected


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
        *({"resample": Image.Resampling[name]} for name in ("NEAREST", "BILINEAR", "BICUBIC")),
    ],
    ids=str,
)
def test_every_option(options):
    check([picture(120, 170), picture(120, 170, seed=1)], **options)


@pytest.mark.parametrize("size", [(2, 2), (300, 2), (96, 96), (97, 96), (513, 257), (40, 4000), (700, 1300)], ids=str)
def test_every_shape_of_picture(size):
    check(picture(*size))
    check(picture(*size), size={"longest_edge": 1456}, max_image_size={"longest_edge": 364})


def test_the_released_size_on_a_photograph():
    check(picture(1500, 2000), size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})


def test_ragged_batches_with_a_sample_of_no_pictures():
    if not TRANSFORMERS_5:
        pytest.skip("transformers 4.57 looks at the first sample's first picture here, which there is not")
    check([[], [picture(40, 80)], [picture(300, 200), picture(96, 96)]])


@pytest.mark.parametrize("kind", ["HWC", "CHW", "torch", "float", "unit float"])
def test_arrays(kind):
    array = np.array(picture(60, 90))
    if kind == "HWC":
        check(array)
    elif kind == "CHW":
        check(array.transpose(2, 0, 1).copy())
    elif kind == "torch":
        check(torch.from_numpy(array).permute(2, 0, 1))
    elif kind == "float":
        check(torch.from_numpy(array).permute(2, 0, 1).float())
    else:
        check(torch.from_numpy(array).permute(2, 0, 1) / 255, do_rescale=False)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA"])
def test_pillow_modes(mode):
    if mode == "RGBA":
        image = picture(60, 90).copy()
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        if not TRANSFORMERS_5:
            pytest.skip("transformers 4.57 drops transparency here")
    else:
        image = picture(60, 90).convert(mode)
    check(image)


def test_the_two_back_ends_differ_by_a_level_or_two_in_a_few_pixels_of_a_thousand():
    """What choosing ``backend="torch"`` costs, as the documentation states it."""
    image = picture(600, 800)
    options = {"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}, "do_normalize": False}
    by_pillow, by_torch = (
        SmolVLMImageProcessor(**options, backend=backend, rescale_factor=1.0)(image, **CALL).pixel_values
        for backend in ("pil", "torch")
    )
    difference = (by_pillow - by_torch).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.02
