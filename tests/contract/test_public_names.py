"""The names that users and other software rely on."""

from __future__ import annotations

import smolvlm_fms as sv
from smolvlm_fms import errors

PROMISED = {
    "load", "bundled", "VLM", "Answer", "SmolVLM", "SmolVLMConfig", "SmolVLMProcessor", "SmolVLMImageProcessor",
    "SmolVLMVideoProcessor", "MultiPatchVisionProcessor", "create_multi_patch_processor", "LlavaNext",
}  # fmt: skip


def test_the_promised_names_are_there() -> None:
    assert set(sv.__all__) >= PROMISED
    assert all(getattr(sv, name) is not None for name in sv.__all__)
    assert set(dir(sv)) >= set(sv.__all__)


def test_every_error_is_public_and_ours() -> None:
    assert set(errors.__all__) <= set(sv.__all__)
    assert all(issubclass(getattr(sv, name), sv.SmolVLMError) for name in errors.__all__)
