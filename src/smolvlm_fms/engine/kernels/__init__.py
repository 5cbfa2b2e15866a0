"""Our own CPU kernels: attention, packed linears and the decode step, behind a C ABI (``csrc/svk.h``).

They are optional: ``available()`` says whether they were built and ``isa()`` which instruction set runs. Everything
else needs them and raises MissingDependencyError without.
"""

from smolvlm_fms.engine.kernels.cache import PackedCache, rope_tables
from smolvlm_fms.engine.kernels.linear import PackedLinear
from smolvlm_fms.engine.kernels.loader import available, isa, use_isa
from smolvlm_fms.engine.kernels.ops import causal_attention, layer_norm, rms_norm, vision_attention
from smolvlm_fms.engine.kernels.text import PackedLayer, PackedText

__all__ = [
    "PackedCache",
    "PackedLayer",
    "PackedLinear",
    "PackedText",
    "available",
    "causal_attention",
    "isa",
    "layer_norm",
    "rms_norm",
    "rope_tables",
    "use_isa",
    "vision_attention",
]
