"""Our own CPU kernels: attention, packed linears and the decode step, behind a C ABI (``csrc/svk.h``).

They are optional: ``built()`` says whether they are there, ``available()`` whether they are also worth using on this
machine, and ``isa()`` which instruction set runs. Everything else raises MissingDependencyError without them.
"""

from smolvlm_fms.engine.kernels.cache import PackedCache, rope_tables
from smolvlm_fms.engine.kernels.linear import PackedLinear
from smolvlm_fms.engine.kernels.loader import available, built, isa, use_isa
from smolvlm_fms.engine.kernels.memory import empty
from smolvlm_fms.engine.kernels.ops import causal_attention, layer_norm, rms_norm, vision_attention
from smolvlm_fms.engine.kernels.text import PackedLayer, PackedText
from smolvlm_fms.engine.kernels.vision import PackedBlocks, TowerLayer

__all__ = [
    "PackedBlocks",
    "PackedCache",
    "PackedLayer",
    "PackedLinear",
    "PackedText",
    "TowerLayer",
    "available",
    "built",
    "causal_attention",
    "empty",
    "isa",
    "layer_norm",
    "rms_norm",
    "rope_tables",
    "use_isa",
    "vision_attention",
]
