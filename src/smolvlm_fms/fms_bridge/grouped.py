"""Checkpoint folders of this package's own, with weights quantised in groups.

    config.json        "quantization_config": {"quant_method": "smolvlm_fms", "weights": "int4", "head": "int8", …}
    *.safetensors      NAME.weight_q      int8 (N, K), or uint8 (N, K / 2): inputs 2i and 2i + 1 as low and high
                                          nibble, plus 8
                       NAME.weight_scale  bf16 (N, K / 32)
                       all other tensors  bf16

NAMEs and the order of rows are Hugging Face's. The values are those that ``smolvlm_fms.load(…, quantize=…)`` makes of
the unquantised checkpoint, so both answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvlm_fms.config import read_json_config
from smolvlm_fms.errors import CheckpointError
from smolvlm_fms.fms_bridge import loading
from smolvlm_fms.fms_bridge.adapters import EMBEDDING, FAMILIES, HEAD, from_source
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.model.grouped import GROUP, GroupedWeight

__all__ = ["METHOD", "bits_of", "grouped_tensors", "load_grouped", "stored_quantization"]

METHOD = "smolvlm_fms"
"""``quant_method`` in ``quantization_config``."""

VALUES, SCALES = "weight_q", "weight_scale"


def stored_quantization(folder: str | Path | Mapping[str, Any]) -> str | None:
    """``"int8"`` or ``"int4"`` where the folder (or its parsed config.json) holds such weights; None elsewhere."""
    said = read_json_config(folder).get("quantization_config") or {}
    if not isinstance(said, Mapping) or said.get("quant_method") != METHOD:
        return None
    kind = said.get("weights")
    if kind not in ("int8", "int4") or said.get("head") != "int8" or said.get("group_size") != GROUP:
        raise CheckpointError(
            f"config.json asks for quantised weights that this version does not know: {dict(said)!r}."
        )
    return str(kind)


def bits_of(name: str, kind: str) -> int | None:
    """Bits of one of our (unfused) tensors in a folder of ``kind``; None for those that stay in bf16."""
    if name == HEAD:
        return 8
    block = name.startswith("text_model.base_model.layers.") and name.endswith(".weight")
    if not block or name.endswith((".ln.weight", ".ff_ln.weight")):
        return None
    return 8 if kind == "int8" else 4


def grouped_tensors(name: str, weight: GroupedWeight) -> dict[str, Tensor]:
    """The two tensors that hold a weight called ``name`` (``….weight``)."""
    stem = name.removesuffix("weight")
    values = weight.values_NK
    if weight.bits == 4:
        nibbles = (F.pad(values, (0, values.shape[1] % 2)) + 8).to(torch.uint8)
        values = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return {stem + VALUES: values.contiguous(), stem + SCALES: weight.scales_NG.contiguous()}


def _unpacked(values: Tensor, inputs: int, bits: int) -> Tensor:
    """int8 (N, inputs) again."""
    if bits == 8:
        return values
    nibbles = torch.stack((values & 15, values >> 4), -1).flatten(1)[:, :inputs]
    return nibbles.to(torch.int8) - 8


def load_grouped(
    folder: str | Path,
    *,
    dequantize: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """The model in such a folder, in evaluation mode. Its quantised linears hold a GroupedWeight each, to be packed by
    the engine; with ``dequantize`` they are plain linears in ``dtype`` (None: bf16), like any other checkpoint's.

    Raises CheckpointError unless the tensors are exactly those that the configuration calls for.
    """
    folder = Path(folder)
    values = read_json_config(folder)
    kind = stored_quantization(values)
    assert kind is not None
    architecture = architecture_of(values.get("model_type"))
    family = FAMILIES[architecture.name]
    config: Any = architecture.config.from_hf(values).updated(fused_weights=False)  # type: ignore[attr-defined]
    checkpoint = loading.open_checkpoint(folder, family)
    with torch.no_grad():
        model = loading._build(architecture, config, False, dtype or torch.bfloat16)
        state: dict[str, Tensor] = {}
        for names in loading._groups(checkpoint):
            state |= from_source(family, "hf", checkpoint.read(names), config)
        plain, grouped = _sorted_out(model, state, kind, folder)
        if dequantize:
            plain |= {name: weight.wide() for name, weight in grouped.items()}
            grouped = {}
        plain = {name: tensor.to(device, dtype or torch.bfloat16) for name, tensor in plain.items()}
        if config.tie_word_embeddings:
            if EMBEDDING in grouped:
                grouped[HEAD] = grouped[EMBEDDING]
            else:
                plain[HEAD] = plain[EMBEDDING]
        model.load_state_dict(plain, strict=False, assign=True)
        for name, weight in grouped.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            del module.weight
            module.weight = weight
    if dequantize:
        model.post_init()
    else:
        model.text_model.base_model.prepare_rope()  # head and embedding are tied by the engine when it packs them
    return model.eval()


def _sorted_out(
    model: Any, state: dict[str, Tensor], kind: str, folder: Path
) -> tuple[dict[str, Tensor], dict[str, GroupedWeight]]:
    """The tensors that are read as they are, and those in groups; both complete, of the right shapes, and no others."""
    plain, grouped, wrong, left = {}, {}, [], dict(state)
    tied = model.config.tie_word_embeddings
    for name, wanted in model.state_dict().items():
        if tied and name == HEAD:
            continue
        bits = bits_of(HEAD if tied and name == EMBEDDING else name, kind)
        stem = name.removesuffix("weight")
        keys = [name] if bits is None else [stem + VALUES, stem + SCALES]
        found = [left.pop(key, None) for key in keys]
        if any(tensor is None for tensor in found):
            wrong.append(f"{name} is missing")
            continue
        tensors = [tensor for tensor in found if tensor is not None]
        inputs = wanted.shape[-1]
        sizes = (
            [wanted.shape]
            if bits is None
            else [(len(wanted), -(-inputs * bits // 8)), (len(wanted), -(-inputs // GROUP))]
        )
        if any(tensor.shape != torch.Size(size) for tensor, size in zip(tensors, sizes, strict=True)):
            wrong.append(f"{name} is {[tuple(tensor.shape) for tensor in tensors]}, not {[tuple(s) for s in sizes]}")
        elif bits is None:
            plain[name] = tensors[0]
        else:
            grouped[name] = GroupedWeight(_unpacked(tensors[0], inputs, bits), tensors[1], bits)
    wrong += [f"{name} is unexpected" for name in left]
    if wrong:
        raise CheckpointError(f"The tensors in {folder} do not fit its config.json: {'; '.join(wrong[:4])}.")
    return plain, grouped
