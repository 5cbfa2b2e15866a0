"""Our model against transformers' on tiny random checkpoints of every family, through files, as users would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from tests.tiny_models import FAMILIES, build_checkpoint, load_peer, make_batch

FP32_LIMIT = 1e-4


class Pair(NamedTuple):
    """One checkpoint loaded by both."""

    folder: Path
    ours: Any
    theirs: Any


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = build_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    with torch.no_grad():
        yield Pair(folder, load_model(folder), load_peer(folder))


def gap(ours: Tensor, theirs: Tensor, attention_mask: Tensor | None = None) -> float:
    """Largest absolute difference, at real tokens."""
    difference = (ours.float() - theirs.float()).abs()
    return float(difference.max() if attention_mask is None else difference[attention_mask.bool()].max())


@pytest.mark.parametrize("tiles", [[1], [2, 0, 3], [0, 0], [0, 1], [12, 1]], ids=str)
def test_logits(pair: Pair, tiles: list[int]) -> None:
    """Padded batches with different numbers of pictures, none, and as many as a video has frames."""
    batch = make_batch(pair.folder, tiles)
    theirs = pair.theirs(**batch).logits
    assert theirs.std() > 0.5  # a comparison of zeros would prove nothing
    assert gap(pair.ours(**batch), theirs, batch["attention_mask"]) <= FP32_LIMIT


def test_saved_folder_is_the_same_checkpoint(pair: Pair, tmp_path: Path) -> None:
    """Load and save: the same names and the same bytes, and transformers reads the folder."""
    save_pretrained(pair.ours, tmp_path)
    before, after = (folder / "model.safetensors" for folder in (pair.folder, tmp_path))
    assert tensors_of(before) == tensors_of(after)
    batch = make_batch(pair.folder, [1, 2])
    assert torch.equal(load_peer(tmp_path)(**batch).logits, pair.theirs(**batch).logits)


def tensors_of(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a safetensors file: dtype, shape, bytes."""
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return {n: (str(t.dtype), tuple(t.shape), t.view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}
