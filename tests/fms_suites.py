"""FMS's own test suites, and what they need to run here. The only module that imports ``fms.testing``.

What stands in for something of FMS's says why; ``test_fms_upstream`` and ``test_hf_fms_suite`` hold tests that fail
when upstream is fixed, and the stand-in can go.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():  # transformers 4 compiles a part of itself with torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)
    import fms.testing._internal.hf.model_test_suite as hf_suites
from fms.testing._internal.model_test_suite import (
    ModelCompileTestSuite,
    ModelConfigTestSuite,
    ModelConsistencyTestSuite,
)

from smolvlm_fms.hf import to_hf_api

__all__ = [
    "WARNINGS",
    "HFAutoModelTestSuite",
    "HFConfigTestSuite",
    "HFModelCompileTestSuite",
    "HFModelEquivalenceTestSuite",
    "HFModelGenerationTestSuite",
    "ModelCompileTestSuite",
    "ModelConfigTestSuite",
    "ModelConsistencyTestSuite",
    "hf_suites",
    "our_side",
]

HFAutoModelTestSuite = hf_suites.HFAutoModelTestSuite
HFConfigTestSuite = hf_suites.HFConfigTestSuite
HFModelCompileTestSuite = hf_suites.HFModelCompileTestSuite
HFModelEquivalenceTestSuite = hf_suites.HFModelEquivalenceTestSuite
HFModelGenerationTestSuite = hf_suites.HFModelGenerationTestSuite

# FMS's suites are written for pytest before 10, leave the file that they read open, and give generate beam options
# without beams.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:Class-scoped fixtures defined as instance methods"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # from inside torch's compiler
    pytest.mark.filterwarnings("ignore:.num_beams. is set to 1"),
]


def our_side(config_class: Any, folder: Path) -> Iterator[None]:
    """While this runs, FMS's suites find our functions where they look for FMS's.

    - Its ``to_hf_api`` knows FMS's own classes only: ours.
    - It asks a transformers configuration class of its own making for ``from_fms_config``; ours are transformers' own
      classes, which get one.
    - Its tokenizer comes from the hub: the one in ``folder``.
    """
    from transformers import AutoTokenizer

    from smolvlm_fms.hf.configuration import hf_config

    def tokenizer(*_: Any, **__: Any) -> Any:
        # Without model_input_names, transformers 4 makes token_type_ids that no model here takes.
        return AutoTokenizer.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_suites, "to_hf_api", to_hf_api)
        patch.setattr(hf_suites, "AutoTokenizer", type("AutoTokenizer", (), {"from_pretrained": tokenizer}))
        patch.setattr(config_class, "from_fms_config", staticmethod(hf_config), raising=False)
        yield
