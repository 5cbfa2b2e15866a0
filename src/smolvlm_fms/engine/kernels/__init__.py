"""Our own CPU kernels: attention, packed linears and the decode step, behind a C ABI (``csrc/svk.h``).

They are optional: ``available()`` says whether they were built and ``isa()`` which instruction set runs. Everything
else needs them and raises MissingDependencyError without.
"""

from smolvlm_fms.engine.kernels.linear import PackedLinear
from smolvlm_fms.engine.kernels.loader import available, isa, use_isa
from smolvlm_fms.engine.kernels.ops import vision_attention

__all__ = ["PackedLinear", "available", "isa", "use_isa", "vision_attention"]
