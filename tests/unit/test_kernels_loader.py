"""Finding, choosing and doing without the compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from smolvlm_fms.engine import kernels
from smolvlm_fms.errors import ConfigurationError


def test_without_the_library_everything_says_so() -> None:
    """In a process of its own, because an opened library stays open."""
    program = """
import torch
from smolvlm_fms.engine import kernels
from smolvlm_fms.errors import MissingDependencyError
assert not kernels.available() and not kernels.built() and kernels.isa() == "none"
linear = kernels.PackedLinear(torch.randn(8, 16))  # packing is plain torch
try:
    linear(torch.randn(1, 16).bfloat16())
except MissingDependencyError as error:
    assert "were not built" in str(error)
else:
    raise SystemExit("it ran")
"""
    environment = os.environ | {"SMOLVLM_KERNELS": "no such file", "LD_PRELOAD": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not kernels.built(), reason="the CPU kernels were not built here")
def test_instruction_sets_are_switched_for_a_block() -> None:
    best, useful = kernels.isa(), kernels.available()
    with kernels.use_isa("portable"):
        assert kernels.isa() == "portable"
        assert kernels.available() == useful  # a property of the machine, not of the block
    assert kernels.isa() == best
    with pytest.raises(ConfigurationError, match="cannot run the 'sse9' kernels"), kernels.use_isa("sse9"):
        pass


@pytest.mark.skipif(not kernels.built(), reason="the CPU kernels were not built here")
def test_calls_from_several_threads_do_not_mix() -> None:
    from concurrent.futures import ThreadPoolExecutor

    linear = kernels.PackedLinear(torch.randn(192, 96), kind="int8")
    inputs = [torch.randn(5, 96).bfloat16() for _ in range(8)]
    alone = [linear(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(linear, inputs * 4))
    assert all(torch.equal(got, want) for got, want in zip(together, alone * 4, strict=True))
