"""``LlavaNextImageProcessor`` against transformers' class of this name, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from smolvlm_fms.config_llava import LLAVA_PRESETS
from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.processing.llava_image import LlavaNextImageProcessor

GRANITE = {
    "size": {"height": 384, "width": 384},
    "crop_size": {"height": 384, "width": 384},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_grid_pinpoints": LLAVA_PRESETS["granite_vision_3_2_2b"].image_grid_pinpoints,
}
LLAVA = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
SMALL = {
    "size": {"shortest_edge": 30},
    "crop_size": {"height": 30, "width": 30},
    "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]],
}
SIZES = [(60, 43), (31, 100), (30, 30), (211, 333), (1, 40), (97, 64), (90, 30)]


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values if bands > 1 else values[..., 0], mode if mode != "L" else None)


def peer(**settings: Any) -> Any:
    """transformers' class on PIL, which 5 has under another name."""
    if int(transformers.__version__.split(".")[0]) < 5:
        return transformers.LlavaNextImageProcessor(**settings)
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil(**settings)


def same(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert type(ours[name]) is type(theirs[name]) and len(ours[name]) == len(theirs[name])
        for mine, other in zip(ours[name], theirs[name], strict=True):
            mine, other = np.asarray(mine), np.asarray(other)
            assert mine.dtype == other.dtype and mine.shape == other.shape
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("settings", [SMALL, LLAVA], ids=["small", "llava"])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_pixels_and_sizes(settings: dict[str, Any], kind: str | None) -> None:
    images = [picture(*size) for size in SIZES]
    same(
        LlavaNextImageProcessor(**settings)(images, return_tensors=kind),
        peer(**settings)(images, return_tensors=kind),
    )


def test_granite_vision_s_own_settings() -> None:
    images = [picture(300, 900), picture(1000, 200)]
    ours = LlavaNextImageProcessor(**GRANITE)(images, return_tensors="pt")
    same(ours, peer(**GRANITE)(images, return_tensors="pt"))
    assert ours["image_sizes"].tolist() == [[300, 900], [1000, 200]]


@pytest.mark.parametrize(
    "options",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"resample": 2},
        {"resample": Image.Resampling.LANCZOS},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"rescale_factor": 1 / 128},
        {"size": 30},
        {"size": {"height": 30, "width": 30}},
        {"size": {"shortest_edge": 36}},
        {"size": {"shortest_edge": 24}},
        pytest.param(
            {"size": {"height": 40, "width": 36}, "crop_size": {"height": 20, "width": 24}},
            marks=pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 makes the overview square"),
        ),
        {"image_grid_pinpoints": [[30, 30]]},
        {"image_grid_pinpoints": [[45, 70], [70, 45]]},
        {"do_pad": True},
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any]) -> None:
    images = [picture(60, 43), picture(31, 100)]
    kind = "pt" if "image_grid_pinpoints" not in options else None
    same(
        LlavaNextImageProcessor(**SMALL)(images, return_tensors=kind, **options),
        peer(**SMALL)(images, return_tensors=kind, **options),
    )
    same(LlavaNextImageProcessor(**(SMALL | options))(images), peer(**(SMALL | options))(images))


def test_the_defaults_leave_ragged_tiles_which_the_crop_evens_out() -> None:
    same(LlavaNextImageProcessor()(picture(300, 200)), peer()(picture(300, 200)))


def test_pictures_keep_their_own_number_of_tiles_without_padding() -> None:
    images = [picture(60, 43), picture(31, 100), picture(90, 30)]
    ours = LlavaNextImageProcessor(**SMALL)(images, do_pad=False)
    same(ours, peer(**SMALL)(images, do_pad=False))
    assert len({len(tiles) for tiles in ours["pixel_values"]}) > 1
    with pytest.raises(ConfigurationError, match="different numbers of tiles"):
        LlavaNextImageProcessor(**SMALL)(images, do_pad=False, return_tensors="pt")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_modes(mode: str) -> None:
    image = picture(50, 70, mode) if mode in ("L", "RGBA", "CMYK") else picture(50, 70).convert(mode)
    if mode == "RGBA":  # transparency is laid on white here and over there
        image = Image.merge("RGBA", (*picture(50, 70).split(), Image.new("L", (70, 50), 255)))
    same(LlavaNextImageProcessor(**SMALL)(image), peer(**SMALL)(image))


@pytest.mark.parametrize("layout", ["flat", "nested", "array", "tensor"])
def test_forms_of_input(layout: str) -> None:
    pictures = [picture(60, 43), picture(31, 100)]
    images: Any = {
        "flat": pictures,
        "nested": [[pictures[0]], [pictures[1]]],
        "array": [np.asarray(one) for one in pictures],
        "tensor": [torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in pictures],
    }[layout]
    same(LlavaNextImageProcessor(**SMALL)(images, return_tensors="np"), peer(**SMALL)(images, return_tensors="np"))


def test_files_go_both_ways(tmp_path: Path) -> None:
    image = picture(60, 43)
    ours = LlavaNextImageProcessor(**SMALL, resample=2, do_normalize=False)
    ours.save_pretrained(tmp_path / "ours")
    theirs = type(peer()).from_pretrained(tmp_path / "ours")
    same(ours(image), theirs(image))
    peer(**GRANITE, rescale_factor=1 / 100).save_pretrained(tmp_path / "theirs")
    read = LlavaNextImageProcessor.from_pretrained(tmp_path / "theirs")
    assert read.rescale_factor == 1 / 100  # type: ignore[attr-defined]
    same(read(image), type(peer()).from_pretrained(tmp_path / "theirs")(image))
    assert LlavaNextImageProcessor.from_pretrained(tmp_path / "ours", do_pad=False).to_dict()["do_pad"] is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_grid_pinpoint": []}, "Did you mean image_grid_pinpoints"),
        ({"image_grid_pinpoints": [336, 672]}, "pairs"),
        ({"image_grid_pinpoints": []}, "empty"),
        ({"size": {"longest_edge": 30}}, "shortest_edge"),
        ({"do_rescale": "yes"}, "do_rescale"),
        ({"return_tensors": "tf"}, "return_tensors"),
        ({"do_center_crop": False, "do_resize": False, "image_grid_pinpoints": [[45, 70]]}, "different sizes"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LlavaNextImageProcessor(**SMALL)(picture(60, 43), **options)


def test_the_tensor_back_end_differs_by_a_level_at_most() -> None:
    """What transformers' torchvision class does with the same steps; its interpolation is torch's own."""
    image = picture(97, 64)
    pil = LlavaNextImageProcessor(**SMALL)(image, return_tensors="pt")
    tensor = LlavaNextImageProcessor(**SMALL, backend="torch")(image, return_tensors="pt")
    assert torch.equal(pil["image_sizes"], tensor["image_sizes"])
    level = 1 / 255 / min(LlavaNextImageProcessor().image_std)  # type: ignore[attr-defined]
    assert float((pil["pixel_values"] - tensor["pixel_values"]).abs().max()) <= 2 * level


def test_number_of_tiles_without_pixels() -> None:
    processor = LlavaNextImageProcessor(**SMALL)
    for size in SIZES:
        tiles = processor(picture(*size))["pixel_values"][0]
        assert processor.get_number_of_image_patches(*size) == len(tiles)
