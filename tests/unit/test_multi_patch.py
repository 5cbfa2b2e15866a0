"""The multi-patch processor: the code that ``forward`` uses for tiles, under the names the design documents give it."""

from __future__ import annotations

import pytest
import torch

import smolvlm_fms as sv
from smolvlm_fms.config import VisionConfig
from smolvlm_fms.errors import ConfigurationError, InputError
from smolvlm_fms.model.multi_patch import MultiPatchVisionProcessor, create_multi_patch_processor
from smolvlm_fms.modules.connector import Idefics3Connector
from smolvlm_fms.modules.vision import SiglipTower


def parts() -> tuple[SiglipTower, Idefics3Connector]:
    torch.manual_seed(0)
    config = VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    tower, connector = SiglipTower(config).eval(), Idefics3Connector(16, 24, 2)
    tower.reset_parameters()
    connector.reset_parameters()
    return tower, connector


def test_it_is_public() -> None:
    assert sv.create_multi_patch_processor is create_multi_patch_processor
    assert isinstance(create_multi_patch_processor(*parts(), tokens_per_patch=4), MultiPatchVisionProcessor)


@pytest.mark.parametrize("at_once", [None, 1, 2, 4, 99])
def test_embeddings_are_joined_in_order(at_once: int | None) -> None:
    tower, connector = parts()
    patches = torch.randn(2, 3, 3, 8, 8)
    processor = create_multi_patch_processor(tower, connector, 4, patches_per_call=at_once)
    with torch.no_grad():
        embeddings, statistics = processor.process_patches(patches)
        expected = torch.stack([torch.cat([connector(tower(p[None]))[0] for p in row]) for row in patches])
    assert embeddings.shape == (2, 12, 24)
    torch.testing.assert_close(embeddings, expected)
    assert (statistics.batch_size, statistics.num_patches, statistics.tokens_per_patch) == (2, 3, 4)
    assert (statistics.total_tokens, statistics.embedding_dim) == (12, 24)
    assert statistics.encoder_calls == {None: 1, 1: 6, 2: 3, 4: 2, 99: 1}[at_once]


def test_masks_reach_the_tower() -> None:
    tower, connector = parts()
    patches, mask = torch.randn(1, 2, 3, 8, 8), torch.ones(1, 2, 4, 4, dtype=torch.bool)
    mask[0, 1, 3:] = False
    processor = create_multi_patch_processor(tower, connector, 4, patches_per_call=1)
    with torch.no_grad():
        embeddings, _ = processor.process_patches(patches, mask)
        torch.testing.assert_close(embeddings[:, 4:], connector(tower(patches[0, 1:], mask[0, 1:])))
    with pytest.raises(InputError, match="does not fit 1 × 2 patches"):
        processor.process_patches(patches, mask[:, :1])


@pytest.mark.parametrize(
    "patches",
    [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(1, 0, 3, 8, 8), torch.zeros(1, 1, 3, 8, 8).byte()],
    ids=lambda p: str(tuple(p.shape)),
)
def test_shapes_and_dtypes_are_checked(patches: torch.Tensor) -> None:
    with pytest.raises(InputError, match="patches must be a floating-point tensor"):
        create_multi_patch_processor(*parts(), 4).process_patches(patches)


def test_a_wrong_number_of_tokens_raises() -> None:
    with pytest.raises(InputError, match="became 4 tokens, not 5"):
        create_multi_patch_processor(*parts(), 5).process_patches(torch.zeros(1, 1, 3, 8, 8))


@pytest.mark.parametrize("arguments", [{"tokens_per_patch": 0}, {"tokens_per_patch": 4, "patches_per_call": 0}])
def test_numbers_below_one_raise(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="must be at least 1"):
        create_multi_patch_processor(*parts(), **arguments)
