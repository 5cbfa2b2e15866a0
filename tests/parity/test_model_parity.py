"""Our model against transformers' on tiny random checkpoints of every family, through files, as users would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fms.utils.generation import generate
from torch import Tensor

from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from tests.tiny_models import FAMILIES, IMAGE_TOKEN, build_checkpoint, load_peer, make_batch

FP32_LIMIT = 1e-4
"""Largest absolute difference in fp32."""

BF16_LIMIT = 0.03
"""Root mean square error of bf16 logits against fp32 ones of the same weights, as a share of the logits' deviation."""


class Pair(NamedTuple):
    """One checkpoint loaded by both."""

    family: str
    folder: Path
    ours: Any
    theirs: Any


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = build_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    with torch.no_grad():
        yield Pair(request.param, folder, load_model(folder), load_peer(folder))


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


def test_vision_features(pair: Pair) -> None:
    """Full and partly covered tiles through tower and connector."""
    batch = make_batch(pair.folder, [2])
    pixels, mask = batch["pixel_values"][0], batch["pixel_attention_mask"][0].bool()
    patch = pair.ours.config.vision.patch_size
    patches = mask.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).any(-1)
    assert not patches.all() and patches.any()
    hidden = pair.theirs.model.vision_model(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state
    ours = pair.ours.encode_images(batch["pixel_values"], batch["pixel_attention_mask"])
    assert ours.tiles_per_row == [2]
    assert gap(pair.ours.vision_tower(pixels, patches), hidden, patches.flatten(1)) <= FP32_LIMIT
    assert gap(ours.features, pair.theirs.model.connector(hidden)) <= FP32_LIMIT


def test_which_transformers_shifts_positions(pair: Pair) -> None:
    """transformers 4 in fp32 moves nearly every patch of a full tile; the peer of these tests has 5's arithmetic."""
    import transformers

    batch = make_batch(pair.folder, [1])
    batch["pixel_attention_mask"] = torch.ones_like(batch["pixel_attention_mask"])
    raw = load_peer(pair.folder, exact_positions=False)
    assert (gap(raw(**batch).logits, pair.ours(**batch)) > FP32_LIMIT) == (transformers.__version__ < "5")


def test_loss(pair: Pair) -> None:
    batch = make_batch(pair.folder, [2, 0, 3])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    # The first token after padding would be predicted from a padding position, whose logits nobody defines.
    labels[:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, -100)
    theirs = pair.theirs(**batch, labels=labels).loss
    logits = pair.ours(**batch)
    ours = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(float(ours - theirs)) <= 1e-5


def test_hidden_states(pair: Pair) -> None:
    batch = make_batch(pair.folder, [1, 2])
    theirs = pair.theirs(**batch, output_hidden_states=True).hidden_states
    _, ours = pair.ours(**batch, output_hidden_states=True)
    assert len(ours) == len(theirs)
    for mine, their in zip(ours, theirs, strict=True):
        assert gap(mine, their, batch["attention_mask"]) <= FP32_LIMIT


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("tiles", [[1], [2, 0, 1]], ids=str)
def test_greedy_tokens(pair: Pair, tiles: list[int], use_cache: bool) -> None:
    """FMS's generate with our hook gives transformers' tokens, left-padded batches and all."""
    batch = make_batch(pair.folder, tiles)
    theirs = pair.theirs.generate(**batch, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    ids = batch.pop("input_ids")
    ours = generate(
        pair.ours, ids, max_new_tokens=12, do_sample=False, use_cache=use_cache,
        prepare_model_inputs_hook=pair.ours.prepare_inputs, extra_kwargs=dict(batch),
    )  # fmt: skip
    assert ours.tolist() == theirs.tolist()
    if len(tiles) > 1:
        assert len(set(ours[:, ids.shape[1] :].flatten().tolist())) > 3  # not one token over and over


def test_bf16(pair: Pair, tmp_path: Path) -> None:
    """In bf16 each implementation rounds in its own places. Ours must be as near to fp32 as theirs, and close to it."""
    folder = build_checkpoint(tmp_path, pair.family, dtype=torch.bfloat16)
    batch = make_batch(folder, [2, 0, 3])
    real = batch["attention_mask"].bool()
    ours, theirs = load_model(folder), load_peer(folder, torch.bfloat16)
    assert ours.vision_tower.dtype == theirs.dtype == torch.bfloat16
    exact = load_model(folder, dtype=torch.float32)(**batch)[real]
    mine, their = ours(**batch)[real].float(), theirs(**batch).logits[real].float()
    error, peer_error = (mine - exact).square().mean().sqrt(), (their - exact).square().mean().sqrt()
    assert error <= 1.2 * peer_error + 1e-3
    assert error <= BF16_LIMIT * exact.std()
    assert float((mine - their).abs().max()) <= 10 * BF16_LIMIT * exact.std()


def test_rows_do_not_depend_on_their_neighbours(pair: Pair) -> None:
    batch = make_batch(pair.folder, [2, 0, 3])
    logits = pair.ours(**batch)
    for row in range(3):
        alone = pair.ours(**{name: value[row : row + 1] for name, value in batch.items()})
        assert gap(logits[row : row + 1], alone, batch["attention_mask"][row : row + 1]) <= FP32_LIMIT


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
