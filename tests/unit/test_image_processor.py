"""The image processor's own behaviour: options, batches, memory, files, helpers."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from smolvlm_fms.errors import ConfigurationError, FetchError, ImageError, InputError
from smolvlm_fms.processing import (
    ProcessedBatch,
    SmolVLMImageProcessor,
    center_crop,
    cut_into_patches,
    normalize,
    preprocess_images,
    resize_keep_aspect,
    split_into_tiles,
)

SMALL = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("do_resize", "yes"),
        ("size", {"shortest_edge": 5}),
        ("size", {"longest_edge": 0}),
        ("size", {"longest_edge": 2.5}),
        ("size", {"height": 5}),
        ("size", "big"),
        ("max_image_size", {"height": 5, "width": 6}),
        ("max_image_size", -1),
        ("resample", 9),
        ("resample", "sinc"),
        ("rescale_factor", 0),
        ("rescale_factor", float("nan")),
        ("image_mean", "0.5"),
        ("image_mean", []),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [0.5, 0.5]),
        ("crop_size", {"longest_edge": 5}),
        ("backend", "cv2"),
        ("detail", "ultra"),
        ("data_format", "nhwc"),
        ("input_data_format", "first"),
        ("return_tensors", "tf"),
        ("device", "toaster"),
    ],
)
def test_values_that_cannot_be_used_name_their_option(option, value):
    with pytest.raises(ConfigurationError, match=option.removeprefix("image_") if "std" not in option else "."):
        SmolVLMImageProcessor(**SMALL)(noise(20, 20), **{option: value})


def test_unknown_options_raise_and_suggest():
    with pytest.raises(ConfigurationError, match="Did you mean do_image_splitting"):
        SmolVLMImageProcessor(do_image_spliting=False)
    with pytest.raises(ConfigurationError, match="Did you mean return_tensors"):
        SmolVLMImageProcessor()(noise(8, 8), return_tensor="pt")
    with pytest.raises(ConfigurationError, match="crop_size"):
        SmolVLMImageProcessor(do_center_crop=True)(noise(8, 8))


def test_sizes_in_every_form():
    for form in (32, {"longest_edge": 32}, {"height": 32, "width": 32}):
        assert SmolVLMImageProcessor(max_image_size=form).max_image_size == {"longest_edge": 32}
    assert SmolVLMImageProcessor(size=100).size == {"height": 100, "width": 100}
    assert SmolVLMImageProcessor(size=(100, 50)).size == {"height": 100, "width": 50}
    for form in (1, Image.Resampling.LANCZOS, "lanczos", "LANCZOS"):
        assert SmolVLMImageProcessor(resample=form).resample == 1


def test_attributes_and_calls_both_override():
    processor = SmolVLMImageProcessor(**SMALL)
    assert processor(noise(20, 20), return_tensors="pt").pixel_values.shape[1] == 17
    assert processor(noise(20, 20), return_tensors="pt", size={"longest_edge": 64}).pixel_values.shape[1] == 5
    processor.size["longest_edge"] = 64
    assert processor(noise(20, 20), return_tensors="pt").pixel_values.shape[1] == 5
    processor.do_image_splitting = False
    assert processor(noise(20, 20), return_tensors="pt").pixel_values.shape[1] == 1
    assert SmolVLMImageProcessor().size == {"longest_edge": 1456}  # nothing leaked into the defaults


@pytest.mark.parametrize("backend", ["pil", "torch", "torch4"])
def test_a_picture_does_not_depend_on_its_neighbours(backend):
    processor = SmolVLMImageProcessor(**SMALL, backend=backend)
    images = [noise(40, 90, 1), noise(130, 31, 2), noise(7, 7, 3)]
    together = processor([[images[0]], [images[1], images[2]]], return_tensors="pt", return_row_col_info=True)
    for sample, picture, start in ((0, 0, 0), (1, 1, 0), (1, 2, 5)):
        alone = processor(images[picture], return_tensors="pt", return_row_col_info=True)
        count = alone.pixel_values.shape[1]
        assert torch.equal(together.pixel_values[sample, start : start + count], alone.pixel_values[0])
        assert together.rows[sample][picture - sample] == alone.rows[0][0]


def test_threads_change_nothing():
    processor, images = SmolVLMImageProcessor(**SMALL), [noise(50, 60, seed) for seed in range(8)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(processor(images, return_tensors="pt").pixel_values)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_black_tiles_are_counted_as_tiles():
    black = Image.new("RGB", (100, 100))
    batch = SmolVLMImageProcessor(**SMALL)([[black], [noise(10, 10), black]], return_tensors="pt")
    assert batch.pixel_attention_mask.flatten(2).all(-1).sum(-1).tolist() == [17, 34]


def test_the_mask_costs_no_memory_and_can_be_cloned():
    mask = SmolVLMImageProcessor(**SMALL)([[noise(9, 9)], []], return_tensors="pt").pixel_attention_mask
    assert mask.shape == (2, 17, 32, 32) and mask.untyped_storage().nbytes() == 2 * 17 * 8
    copied = mask.clone()
    copied[0, 0, 0, 0] = 0
    assert mask[0, 0, 0, 0] == 1


def test_formats_of_the_result():
    image = noise(20, 30)
    processor = SmolVLMImageProcessor(**SMALL)
    first = processor(image, return_tensors="pt").pixel_values
    last = processor(image, return_tensors="pt", data_format="channels_last").pixel_values
    assert torch.equal(last, first.permute(0, 1, 3, 4, 2))
    assert isinstance(processor(image, return_tensors="np").pixel_values, np.ndarray)
    lists = processor([[image], [image, image]], do_pad=False).pixel_values
    assert [len(sample) for sample in lists] == [first.shape[1], 2 * first.shape[1]]
    with pytest.raises(ConfigurationError, match="do_pad"):
        processor([[image], [image, image]], do_pad=False, return_tensors="pt")
    grey = image.convert("L")
    one = processor(grey, return_tensors="pt", do_convert_rgb=False, image_mean=0.5, image_std=0.5).pixel_values
    three = processor(grey, return_tensors="pt").pixel_values
    assert one.shape[2] == 1 and torch.equal(one.expand_as(three), three)
    with pytest.raises(ImageError, match="channels in one batch"):
        processor([grey, image], do_convert_rgb=False)


def test_detail():
    processor = SmolVLMImageProcessor(**SMALL)
    for detail, count in {"low": 1, "auto": 5, "high": 13}.items():
        assert processor(noise(40, 60), return_tensors="pt", detail=detail).pixel_values.shape[1] == count
    assert processor.plan(40, 60, detail="auto").count == 5
    assert processor.get_number_of_image_patches(40, 60, {"detail": "low"}) == (1, 0, 0)
    assert processor.get_number_of_image_patches(40, 60) == (13, 3, 4)


def test_center_crop_after_the_first_resize():
    image = noise(100, 200)
    processor = SmolVLMImageProcessor(
        size={"longest_edge": 64},
        max_image_size=32,
        do_center_crop=True,
        crop_size=32,
        do_normalize=False,
        do_rescale=False,
    )
    tile = processor(image, return_tensors="np").pixel_values[0, 0]
    resized = np.asarray(image.resize((64, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(tile, resized[:, 16:48].transpose(2, 0, 1))


def test_refuses_a_batch_that_cannot_fit():
    with pytest.raises(ImageError, match="Leave do_resize on"):
        SmolVLMImageProcessor(do_resize=False, max_image_size=512)(np.zeros((2, 500_000, 3), np.uint8))


def test_files_round_trip_with_fields_that_mean_nothing_here(tmp_path):
    released = {
        "do_resize": True,
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "max_image_size": {"longest_edge": 512},
        "size": {"longest_edge": 2048},
        "resample": 1,
        "video_sampling": {"fps": 1},
        "image_seq_len": None,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
    processor = SmolVLMImageProcessor.from_pretrained(tmp_path, do_pad=False)
    assert processor.size == {"longest_edge": 2048} and processor.do_pad is False
    assert processor.to_dict()["video_sampling"] == {"fps": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_seq_len": 64, "image_processor": released}))
    written = processor.save_pretrained(tmp_path)
    assert len(written) == 2
    nested = json.loads((tmp_path / "processor_config.json").read_text())
    assert nested["image_seq_len"] == 64 and nested["image_processor"]["do_pad"] is False
    assert nested["image_processor"]["image_processor_type"] == "Idefics3ImageProcessor"
    assert repr(SmolVLMImageProcessor.from_pretrained(tmp_path)) == repr(processor)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FetchError, match="holds neither"):
        SmolVLMImageProcessor.from_pretrained(tmp_path)
    for text in ("{", "[]", "\x00"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(ConfigurationError):
            SmolVLMImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": -4}}')
    with pytest.raises(ConfigurationError, match="size"):
        SmolVLMImageProcessor.from_pretrained(tmp_path)


def test_helpers_are_the_steps_of_the_processor():
    image = noise(60, 100)
    resized = resize_keep_aspect(image, 128)
    assert resized.shape == (76 + 76 % 2, 128, 3)
    canvas = np.asarray(Image.fromarray(resized).resize((128, 96), Image.Resampling.LANCZOS))
    tiles = split_into_tiles(canvas, 32)
    batch = preprocess_images(image, **SMALL)
    assert batch.rows == [[3]] and batch.cols == [[4]] and len(tiles) == 12
    for index, tile in enumerate(tiles):
        assert torch.equal(normalize(tile), batch.pixel_values[0, index])
    assert np.array_equal(center_crop(image, (20, 30)), np.asarray(image)[20:40, 35:65])
    padded = center_crop(image, (62, 30))
    assert not padded[0].any() and not padded[-1].any() and np.array_equal(padded[1:-1], np.asarray(image)[:, 35:65])
    with pytest.raises(InputError, match="whole tiles"):
        split_into_tiles(canvas, 40)


def test_patches_are_what_a_convolution_sees():
    pixels = torch.randn(2, 3, 32, 48)
    weight = torch.randn(5, 3, 16, 16)
    by_patches = cut_into_patches(pixels, 16) @ weight.flatten(1).T
    by_convolution = torch.nn.functional.conv2d(pixels, weight, stride=16).flatten(2).mT
    assert torch.allclose(by_patches, by_convolution, atol=1e-3)
    with pytest.raises(InputError):
        cut_into_patches(pixels, 15)


def test_batches_are_mappings_with_attributes():
    tensors = {"pixel_values": torch.zeros(1, 2), "ids": torch.arange(3)}
    batch = ProcessedBatch(tensors | {"rows": [[1]], "frames": [torch.ones(2)]})
    assert dict(**batch).keys() == batch.keys() and batch.rows == [[1]]
    assert batch.to(torch.bfloat16) is batch
    assert batch.pixel_values.dtype == batch.frames[0].dtype == torch.bfloat16 and batch.ids.dtype == torch.int64
    batch.to("cpu", dtype=torch.float64).to(device="meta")
    assert batch.ids.device.type == "meta" and batch.pixel_values.dtype == torch.float64
    assert ProcessedBatch({"a": torch.zeros(1)}).to(torch.zeros(1, dtype=torch.float16)).a.dtype == torch.float16
    with pytest.raises(AttributeError, match="no 'masks'"):
        _ = batch.masks


def test_batches_and_processors_copy_and_pickle():
    batch = ProcessedBatch({"ids": torch.arange(3)})
    assert torch.equal(pickle.loads(pickle.dumps(batch)).ids, copy.deepcopy(batch).ids)
    processor = SmolVLMImageProcessor(**SMALL)
    assert repr(pickle.loads(pickle.dumps(processor))) == repr(copy.deepcopy(processor)) == repr(processor)
