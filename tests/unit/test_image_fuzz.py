"""Random bytes, damaged files and random arrays: pixels or our own errors, never anything else, never a hang."""

from __future__ import annotations

import functools
import io
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm_fms.errors import SmolVLMError
from smolvlm_fms.processing import SmolVLMImageProcessor

# Decoders say what they think of damaged files in warnings; here only crashes matter.
pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "PCX", "JPEG2000")
SECONDS = 20.0


@functools.cache
def real_file(kind: str, mode: str) -> bytes:
    y, x = np.mgrid[0:24, 0:36]
    image = Image.fromarray(np.stack([x * 7, y * 10, (x * y) % 256], -1).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def survive(images, **options) -> None:
    """Process within the time, giving tiles of the right shape or an error of ours."""
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            processor = SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
            pixels = processor(images, return_tensors="pt", **options).pixel_values
            assert pixels.shape[2:] == (3, 32, 32) and bool(pixels.isfinite().all())
        except SmolVLMError as error:
            assert len(str(error)) < 2000
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), f"still running after {SECONDS} s"
    if outcome:
        raise outcome[0]


@QUICK
@given(st.binary(max_size=2000))
def test_random_bytes(data):
    survive(data)


@QUICK
@given(st.sampled_from(KINDS), st.sampled_from(("L", "RGB")), st.floats(0, 1))
def test_truncated_files(kind, mode, part):
    data = real_file(kind, mode)
    survive(data[: int(len(data) * part)])


@settings(QUICK, max_examples=250)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(("L", "RGB")),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    st.booleans(),
)
def test_mutated_files(kind, mode, changes, in_header):
    data = bytearray(real_file(kind, mode))
    reach = min(len(data), 64) if in_header else len(data)
    for place, value in changes:
        data[int(place * reach)] = value
    survive(bytes(data))


@QUICK
@given(
    st.lists(st.integers(0, 9), min_size=0, max_size=5),
    st.sampled_from(
        ["uint8", "int8", "uint16", "int64", "float16", "float32", "float64", "bool", "complex64", "object"]
    ),
    st.sampled_from([0, 1, 0.5, 200, 300, -1, 70_000, float("nan"), float("inf")]),
    st.sampled_from([None, "channels_first", "channels_last", "none"]),
    st.sampled_from(["pil", "torch", "torch4"]),
)
def test_random_arrays(shape, dtype, value, order, backend):
    with np.errstate(all="ignore"):
        array = np.full(shape, value).astype(dtype)
    survive(array, input_data_format=order, backend=backend)
    survive([array, array], input_data_format=order, backend=backend)


@QUICK
@given(
    st.recursive(
        st.one_of(
            st.none(), st.text(max_size=100), st.binary(max_size=20), st.integers(), st.just(np.zeros((4, 5, 3)))
        ),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    )
)
def test_random_nesting(images):
    survive(images)
