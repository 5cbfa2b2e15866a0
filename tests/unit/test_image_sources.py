"""Every kind of picture that people pass, and every kind of damage: the right pixels or our own error."""

from __future__ import annotations

import base64
import http.server
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from smolvlm_fms.errors import FetchError, ImageError, SmolVLMError
from smolvlm_fms.processing import SmolVLMImageProcessor, load_image
from smolvlm_fms.processing.pixels import to_picture
from smolvlm_fms.processing.resample import as_array

SMALL = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def photo(height: int = 20, width: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(source, **options) -> np.ndarray:
    return as_array(to_picture(load_image(source), **options).pixels)


# Where a picture comes from


def test_every_way_to_hand_over_the_same_picture(tmp_path):
    data = encoded(photo())
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    quoted = "".join(f"%{byte:02x}" for byte in data)
    expected = np.asarray(photo())
    ways = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), photo(), expected]
    ways += [torch.from_numpy(expected.copy()), expected.transpose(2, 0, 1), text, f"data:image/png;base64,{text}"]
    ways += [f"data:image/png,{quoted}", f"DATA:image/png;base64,{text.rstrip('=')}"]
    for way in ways:
        assert np.array_equal(rgb(way), expected), type(way)
    with path.open("rb") as file:
        assert np.array_equal(rgb(file), expected)


def test_a_file_that_lies_about_its_type_is_read_for_what_it_is(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(photo()))
    assert np.array_equal(rgb(path), np.asarray(photo()))
    path.write_text("<html>Not found</html>")
    with pytest.raises(ImageError, match="not a picture; it begins with b'<html>"):
        load_image(path)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/photo")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        if self.path == "/photo":
            self.wfile.write(encoded(photo()))
        if self.path == "/drip":
            try:
                for _ in range(100):
                    self.wfile.write(b"x" * 100)
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                pass
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass

    def log_message(self, *unused):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=instance.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    instance.server_close()
    thread.join()


def test_urls(server):
    assert np.array_equal(rgb(f"{server}/photo"), np.asarray(photo()))
    assert np.array_equal(rgb(f"{server}/moved"), np.asarray(photo()))
    with pytest.raises(FetchError, match="404"):
        load_image(f"{server}/missing")
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"not complete after 0\.3 s"):
        load_image(f"{server}/drip", timeout=0.3)
    assert time.monotonic() - start < 3
    with pytest.raises(FetchError, match="larger than 1,000,000 bytes"):
        load_image(f"{server}/endless", max_bytes=1_000_000)
    for url in ("http://127.0.0.1:1/photo.png", "http://", "https://[::1"):
        with pytest.raises(FetchError):
            load_image(url, timeout=1)


def test_what_is_not_there_says_so(tmp_path):
    for path in (tmp_path / "none.png", str(tmp_path / "none.png"), "", "!" * 5000, "a\0b"):
        with pytest.raises(FetchError):
            load_image(path)
    with pytest.raises(FetchError, match="folder"):
        load_image(tmp_path)
    for junk in (b"", "data:image/png;base64", "data:image/png;base64,@@@@", 3, None, object(), {}):
        with pytest.raises(ImageError):
            load_image(junk)
    with pytest.raises(ImageError, match="binary mode"):
        load_image(io.StringIO("text"))


def test_limits_on_bytes(tmp_path):
    data = encoded(photo())
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for source in (path, io.BytesIO(data), f"data:image/png;base64,{base64.b64encode(data).decode()}"):
        with pytest.raises(ImageError, match="more than"):
            load_image(source, max_bytes=50)


# What is in a picture


def test_exif_orientation_turns_files_and_open_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), exif=exif)
    upright = np.rot90(np.asarray(photo()), -1)
    assert np.array_equal(rgb(data), upright)
    assert np.array_equal(rgb(Image.open(io.BytesIO(data))), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's, and true
def test_a_broken_exif_block_is_no_reason_to_refuse():
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x99" * 40)
    assert rgb(data).shape == (20, 30, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparency_is_laid_on_white(mode):
    black = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.info["transparency"] = 0
    elif mode == "RGB":
        image = Image.new("RGB", (4, 4))
        image.info["transparency"] = (0, 0, 0)
    elif mode == "PA":
        image = Image.new("PA", (4, 4), (0, 0))
    else:
        image = black.convert(mode)
    assert (rgb(image) == 255).all()
    if mode != "PA":  # no file format keeps that mode
        see_through = image.info["transparency"] if mode in ("P", "RGB") else None
        assert (rgb(encoded(image, transparency=see_through)) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white():
    assert np.array_equal(rgb(Image.new("RGBA", (1, 1), (0, 100, 200, 128)))[0, 0], [127, 177, 227])
    array = np.array([[[0, 100, 200, 128]]], np.uint8).repeat(9, 0).repeat(9, 1)
    assert np.abs(rgb(array).astype(int) - [127, 177, 227]).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_mode_becomes_rgb(mode):
    white = Image.new("RGB", (5, 5), (255, 255, 255)).convert(mode)
    assert (rgb(white) == 255).all()
    assert (rgb(Image.new("RGB", (5, 5)).convert(mode)) == 0).all()


def test_16_bit_and_float_greys_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 50, dtype=np.uint16).reshape(5, 10)
    expected = np.rint(ramp / 257)[..., None].repeat(3, -1)
    assert np.array_equal(rgb(encoded(Image.fromarray(ramp))), expected)
    assert np.array_equal(rgb(ramp), expected)
    assert np.array_equal(rgb(Image.fromarray(ramp.astype(np.int32))), expected)
    assert np.array_equal(rgb(Image.fromarray((ramp / 65535).astype(np.float32))), expected)
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert rgb(dark).max() == 1  # a 16-bit file is 16-bit however dark it is


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        exact = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **exact)
        assert np.array_equal(rgb(data)[0, 0], [255, 0, 0]), kind


# Damage and malice


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    bomb = b"\x89PNG\r\n\x1a\n" + body
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"(?i)pixels"):
        load_image(bomb)
    with pytest.raises(ImageError, match="more than the limit of 100"):
        load_image(encoded(photo()), max_pixels=100)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files(kind):
    data = encoded(photo(60, 60), kind)
    for length in (3, 30, len(data) // 2, len(data) - 40):
        with pytest.raises(ImageError):
            load_image(data[:length])


def test_formats_that_run_other_programs_are_not_opened():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="not a picture"):
        load_image(script)


# Arrays


def test_where_the_channels_are_must_be_evident():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    for shape in ((3, 3, 3), (3, 7, 3), (3, 600, 1), (1, 5, 4)):
        with pytest.raises(ImageError, match="input_data_format"):
            rgb(np.zeros(shape, np.uint8))
    assert np.array_equal(rgb(cube, order="channels_last"), cube)
    assert np.array_equal(rgb(cube, order="channels_first"), cube.transpose(1, 2, 0))
    processor = SmolVLMImageProcessor(**SMALL)
    orders = ("channels_first", "channels_last")
    first, last = (processor(cube, input_data_format=order).pixel_values for order in orders)
    assert not np.array_equal(first, last)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 5, 2), np.uint8),
        np.zeros((5, 6, 7), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((2, 2, 5, 5, 3), np.uint8),
        np.full((5, 5, 3), -1.0),
        np.full((5, 5, 3), 256.0),
        np.full((5, 5, 3), np.nan),
        np.full((5, 5, 3), np.inf, np.float32),
        np.full((5, 5, 3), 1000, np.int64),
        np.full((5, 5, 3), 1j),
        np.full((5, 5, 3), "a"),
        np.full((5, 5, 3), None),
    ],
    ids=lambda array: f"{array.shape} {array.dtype} {array.flat[0] if array.size else ''}",
)
def test_arrays_that_are_no_pictures(array):
    for backend in ("pil", "torch"):
        with pytest.raises(ImageError):
            SmolVLMImageProcessor(**SMALL, backend=backend)(array)


@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64", "unit", "bfloat16", "float16", "strided"])
def test_every_dtype_means_the_same_picture(dtype, backend):
    whole = np.asarray(photo())
    image = {
        "unit": whole / 255.0,
        "bfloat16": torch.from_numpy(whole.copy()).bfloat16(),
        "float16": torch.from_numpy(whole.copy()).half(),
        "strided": np.ascontiguousarray(whole[:, ::-1])[:, ::-1],
    }.get(dtype)
    image = whole.astype(dtype) if image is None else image
    processor = SmolVLMImageProcessor(**SMALL, backend=backend)
    expected = processor(whole, return_tensors="pt").pixel_values
    # Floats stay floats in the tensor back end (as in transformers); a pixel may differ by what rounding took away.
    allowed = 0.0 if backend == "pil" and dtype not in ("unit",) else 0.05
    assert (processor(image, return_tensors="pt").pixel_values - expected).abs().max() <= allowed


def test_black_and_white_floats_are_one_not_one_255th():
    for white in (np.ones((8, 8, 3)), np.ones((8, 8), bool), torch.ones(3, 8, 8)):
        assert SmolVLMImageProcessor(**SMALL)(white, return_tensors="pt").pixel_values.eq(1).all()


# Nesting


def test_nesting():
    processor = SmolVLMImageProcessor(**SMALL, do_image_splitting=False)
    image, array = photo(), np.asarray(photo())
    shapes = {
        "one": (image, (1, 1)),
        "list": ([image, image], (1, 2)),
        "tuple": ((image, image), (1, 2)),
        "nested": ([[image], [image, image]], (2, 2)),
        "empty first": ([[], [image]], (2, 1)),
        "4-D": (np.stack([array] * 3), (1, 3)),
        "list of 4-D": ([np.stack([array] * 3), np.stack([array] * 2)], (2, 3)),
        "bytes": ([[encoded(image)], [array]], (2, 1)),
    }
    for name, (images, expected) in shapes.items():
        assert processor(images, return_tensors="pt").pixel_values.shape[:2] == expected, name
    for wrong in ([], [[]], [[], []], [image, [image]], [[[image]]], None, [None], [[None]]):
        with pytest.raises(ImageError):
            processor(wrong)


def test_the_message_names_the_picture():
    with pytest.raises(ImageError, match="Picture 1 of sample 2: "):
        SmolVLMImageProcessor(**SMALL)([[], [photo()], [photo(), b"junk"]])
    assert issubclass(ImageError, SmolVLMError) and issubclass(ImageError, ValueError)
