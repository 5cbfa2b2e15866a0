"""FMS's own suite for models behind transformers' interface, over SmolVLM and LLaVA-Next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.hf import FmsForConditionalGeneration, FmsModel, register, to_hf_api, unregister
from tests.fms_suites import (
    WARNINGS,
    HFAutoModelTestSuite,
    HFConfigTestSuite,
    HFModelCompileTestSuite,
    HFModelEquivalenceTestSuite,
    HFModelGenerationTestSuite,
    hf_suites,
    our_side,
)
from tests.tiny import build_tokenizer
from tests.tiny_llava import build_llava, load_llava_peer
from tests.tiny_models import build_checkpoint, load_peer

pytestmark = WARNINGS


def generating(model: Any) -> Any:
    """The suite penalises repeated tokens and, among them, a row's padding: so that token must not be written."""
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [2]
    return model


class Suite(
    HFConfigTestSuite,  # type: ignore[misc]
    HFModelCompileTestSuite,  # type: ignore[misc]
    HFModelEquivalenceTestSuite,  # type: ignore[misc]
    HFModelGenerationTestSuite,  # type: ignore[misc]
    HFAutoModelTestSuite,  # type: ignore[misc]
):
    """All of FMS's suites; a subclass says which checkpoint."""

    __test__ = False
    _get_hf_signature_params = ["input_ids", "labels"]  # noqa: RUF012  (the suite's own interface)
    _hf_specific_params = ["dtype"]  # noqa: RUF012  (that of the model's weights)
    model_type: str

    def build(self, folder: Path) -> Path:
        raise NotImplementedError

    def peer(self, folder: Path) -> Any:
        raise NotImplementedError

    @pytest.fixture(scope="class", autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        folder = self.build(build_tokenizer(tmp_path_factory.mktemp("suite"), padding_side="left"))
        sides = our_side(type(AutoConfig.from_pretrained(folder)), folder)
        next(sides)
        register((self.model_type,))
        yield folder
        unregister()
        next(sides, None)

    @pytest.fixture(scope="class")
    def model(self, folder: Path) -> Any:
        return load_model(folder, scale_logits=False) if self.model_type == "llava_next" else load_model(folder)

    @pytest.fixture(scope="class")
    def config(self, model: Any) -> Any:
        return model.config

    @pytest.fixture(scope="class")
    def fms_hf_model(self, model: Any) -> Any:
        adapted = to_hf_api(model, pad_token_id=2)  # the suite reads it here, where transformers 5 has it no more
        return generating(adapted)

    @pytest.fixture(scope="class")
    def fms_hf_config(self, model: Any) -> Any:
        return to_hf_api(model).config

    @pytest.fixture(scope="class")
    def oss_hf_model(self, folder: Path) -> Any:
        model = self.peer(folder)
        model.config.pad_token_id = 2
        return generating(model)

    def test_hf_automodel_headless(self, fms_hf_model: Any, tmp_path: Path) -> None:
        """FMS's test wants the headless class to be a base of the class with a head, and ``lm_head`` None on it: FMS's
        own ``HFModelArchitecture``. transformers has two classes, and so have we.
        """
        fms_hf_model.save_pretrained(tmp_path)
        assert isinstance(AutoModel.from_pretrained(tmp_path), FmsModel)

    def test_hf_automodel_language_modeling_head(self, fms_hf_model: Any, tmp_path: Path) -> None:
        """FMS's test skips what is not derived from ``HFDecoderModelArchitecture``, and asks ``AutoModelForCausalLM``,
        in which transformers lists no SmolVLM; its own factory for these models does.
        """
        assert not isinstance(fms_hf_model, hf_suites.HFDecoderModelArchitecture)
        fms_hf_model.save_pretrained(tmp_path)
        assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), type(fms_hf_model))
        with pytest.raises(ValueError, match="AutoModel"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


class TestSmolVLM(Suite):
    __test__ = True
    model_type = "smolvlm"

    def build(self, folder: Path) -> Path:
        return build_checkpoint(folder, "smolvlm", text={"num_hidden_layers": 1})  # compiled once: keep it small

    def peer(self, folder: Path) -> Any:
        return load_peer(folder)


class TestLlavaNext(Suite):
    __test__ = True
    model_type = "llava_next"

    def build(self, folder: Path) -> Path:
        return build_llava(folder, "granite", text={"num_hidden_layers": 1})

    def peer(self, folder: Path) -> Any:
        return load_llava_peer(folder)


def test_the_suites_still_need_our_side(tmp_path: Path) -> None:
    """When this fails, FMS's ``to_hf_api`` takes models of others, and ``our_side`` may leave it alone."""
    from fms.models.hf import to_hf_api as theirs

    with torch.no_grad(), pytest.raises(ValueError, match="is not one of"):
        theirs(load_model(build_checkpoint(tmp_path, "smolvlm")))
    assert FmsForConditionalGeneration.__name__ not in str(hf_suites.HFDecoderModelArchitecture.__subclasses__())
