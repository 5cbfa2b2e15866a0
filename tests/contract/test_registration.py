"""FMS knows our architectures whatever is imported first, each order in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = {
    "package, then FMS": "import smolvlm_fms; import fms.models",
    "FMS, then package": "import fms.models; import smolvlm_fms",
    "the loader first": "from smolvlm_fms.fms_bridge.loading import load_model; import fms.models",
    "the model first": "from smolvlm_fms.model.smolvlm import SmolVLM; import fms.models",
    "get_model itself": "import smolvlm_fms; from fms.models import get_model; import fms.models",
}


@pytest.mark.parametrize("order", ORDERS)
def test_variants_are_registered(order: str) -> None:
    check = "assert '256m_instruct' in fms.models.list_variants('smolvlm'), fms.models.list_models()"
    done = subprocess.run([sys.executable, "-c", f"{ORDERS[order]}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
