"""A folder with quantised weights for this package's own engine (``smolvlm_fms.load(folder)``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smolvlm_fms.engine import cpu_runner
from smolvlm_fms.engine.kernels.packing import quantize_groups
from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.export.checks import Check, compare, make_cases, own_forward
from smolvlm_fms.export.output import copy_processor_files
from smolvlm_fms.export.targets import weight_bytes
from smolvlm_fms.fms_bridge.adapters import EMBEDDING, FAMILIES, HEAD
from smolvlm_fms.fms_bridge.grouped import METHOD, bits_of, grouped_tensors, load_grouped
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.fms_bridge.saving import hf_state_dict
from smolvlm_fms.model.grouped import GROUP, GroupedWeight

__all__ = ["QuantizedFolder"]

FILE = "smolvlm_fms-{}.safetensors"
"""Not ``model.safetensors``: transformers would warn of a quantisation that it does not know, and then go on with
random weights in the place of those that it cannot read. Without that file it stops."""


class QuantizedFolder:
    """Text weights in eight or four bits, the head in eight, everything else in bf16."""

    dtype: torch.dtype | None = torch.bfloat16

    def __init__(self, quantize: str) -> None:
        self.quantize = quantize

    def expected_bytes(self, model: Any) -> int:
        return weight_bytes(model)  # of bf16: more than it will be

    def write(self, model: Any, source: Path, out: Path) -> None:
        if not cpu_runner.suits(model):
            dtype = next(model.parameters()).dtype
            raise ConfigurationError(
                f"The engine's quantised path computes models in bfloat16 with SwiGLU text; this one is in {dtype} "
                f"with {model.config.text.hidden_act}. Leave --dtype out."
            )
        config = model.config
        family = FAMILIES[architecture_of(config.model_type).name]
        tensors: dict[str, Tensor] = {}
        for name, tensor in hf_state_dict(model).items():
            ours = family.ours(name) or name
            bits = bits_of(HEAD if ours == EMBEDDING and config.tie_word_embeddings else ours, self.quantize)
            if bits is None:
                tensors[name] = tensor
            else:
                values, scales = quantize_groups(tensor, bits)
                tensors |= grouped_tensors(name, GroupedWeight(values, scales, bits))
        said = {"quant_method": METHOD, "weights": self.quantize, "head": "int8", "group_size": GROUP}
        values_json = config.updated(dtype="bfloat16").to_hf() | {"quantization_config": said}
        save_file(tensors, out / FILE.format(self.quantize), metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(values_json, indent=2) + "\n", encoding="utf-8")
        copy_processor_files(source, out)

    def check(self, model: Any, source: Path, out: Path) -> list[Check]:
        """The folder, loaded, is to compute what quantising at load computes, to the bit."""
        cases = make_cases(source, model.config)
        again = load_grouped(out)
        cpu_runner.pack_model(again, self.quantize)
        cost = compare(model, own_forward(again), cases, what=f"{self.quantize} to bfloat16, ", bound=None)
        cpu_runner.pack_model(model, self.quantize)
        return compare(model, own_forward(again), cases, what="quantised at load, ", bound=0.0) + cost
