"""GGUF: the text model and the vision part (``mmproj``) as an unmodified llama.cpp loads them.

    smolvlm convert MODEL OUT --to gguf        OUT/MODEL-BF16.gguf   OUT/mmproj-MODEL-BF16.gguf
    llama-mtmd-cli -m OUT/MODEL-BF16.gguf --mmproj OUT/mmproj-MODEL-BF16.gguf --image photo.jpg -p "What is this?"

Matrices keep the model's dtype, or become Q8_0 (int8) or Q4_0 (int4) in the text model; vectors and the embeddings of
patches are fp32, which is what llama.cpp computes with. Files are written tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.export.checks import Check
from smolvlm_fms.export.gguf_checks import check_files
from smolvlm_fms.export.gguf_metadata import write_text_metadata, write_vision_metadata
from smolvlm_fms.export.targets import weight_bytes
from smolvlm_fms.fms_bridge.adapters import rename, split
from smolvlm_fms.fms_bridge.gguf import ACTIVATIONS, TEXT_NAMES, VISION_NAMES, gguf_package

__all__ = ["GgufFiles", "rope_factors", "tensor_type"]

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}
BLOCK = 32
"""Values that share a scale in Q8_0 and Q4_0; shorter rows stay as they are."""


class GgufFiles:
    """Two files, for llama.cpp."""

    dtype: torch.dtype | None = None

    def __init__(self, quantize: str | None = None) -> None:
        self.quantize = quantize
        self._package = gguf_package()
        self._written = Path(), Path()

    def expected_bytes(self, model: Any) -> int:
        return weight_bytes(model) + 16 * 2**20  # with the tokenizer

    def write(self, model: Any, source: Path, out: Path) -> None:
        _refuse(model)
        dtype = TYPES[next(model.parameters()).dtype]
        text, vision = self._written = self._files(model, source, out)
        writer = self._package.GGUFWriter(text, model.config.text.model_type.replace("mistral", "llama"))
        write_text_metadata(writer, model.config, source, QUANTIZED.get(self.quantize or "", dtype))
        self._write(writer, text_tensors(model), self.quantize)
        writer = self._package.GGUFWriter(vision, "clip")
        write_vision_metadata(writer, model.config, source, dtype)
        self._write(writer, vision_tensors(model), None)

    def check(self, model: Any, source: Path, out: Path) -> list[Check]:
        return check_files(model, source, *self._written, self.quantize)

    def _files(self, model: Any, source: Path, out: Path) -> tuple[Path, Path]:
        dtype = TYPES[next(model.parameters()).dtype]
        kind = QUANTIZED.get(self.quantize or "", dtype)
        name = source.resolve().name
        return out / f"{name}-{kind}.gguf", out / f"mmproj-{name}-{dtype}.gguf"

    def _write(self, writer: Any, tensors: list[tuple[str, Tensor]], quantize: str | None) -> None:
        """Sizes first, then each tensor's bytes: nothing is held twice."""
        import numpy as np

        kinds = {name: tensor_type(name, tensor, quantize) for name, tensor in tensors}
        sizes = self._package.GGML_QUANT_SIZES
        for name, tensor in tensors:
            block, size = sizes[kinds[name]]
            row = tensor.shape[-1] // block * size
            shape = (*tensor.shape[:-1], row)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            data = self._package.quantize(tensor.detach().float().numpy(), kinds[name])
            writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8))
        writer.close()


def _refuse(model: Any) -> None:
    config = model.config
    if not hasattr(config, "scale_factor"):
        raise ConfigurationError(
            "Only SmolVLM and Idefics3 can be written as GGUF; LLaVA-Next has llama.cpp's own tool."
        )
    if config.vision.hidden_act not in ACTIVATIONS:
        raise ConfigurationError(
            f"llama.cpp's tower has no {config.vision.hidden_act}; it has {', '.join(ACTIVATIONS)}."
        )
    if config.text.hidden_act != "silu":
        raise ConfigurationError(f"llama.cpp's text model computes silu, not {config.text.hidden_act}.")


def text_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """The text model's tensors under GGUF's names. A tied head is left out."""
    named = dict(_named(model, TEXT_NAMES, "text_model."))
    if model.config.tie_word_embeddings:
        named.pop("output.weight", None)
    factors = rope_factors(model.config.text)
    return [*named.items(), *([] if factors is None else [("rope_freqs.weight", factors)])]


def vision_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Tower and connector under GGUF's names."""
    return [*_named(model, VISION_NAMES, "vision_tower."), *_named(model, VISION_NAMES, "connector.")]


def _named(model: Any, names: dict[str, str], prefix: str) -> Iterator[tuple[str, Tensor]]:
    theirs = {ours: theirs for theirs, ours in names.items()}
    for name, tensor in split(model.state_dict(), model.config).items():
        if name.startswith(prefix):
            target = rename(theirs, name)
            assert target is not None, name
            yield target, tensor


def rope_factors(config: Any) -> Tensor | None:
    """What Llama 3 divides its rotary frequencies by, (head_dim / 2,) fp32; None without that scaling.

    Long wavelengths are stretched by ``factor``, short ones kept, those between blended
    (transformers' ``_compute_llama3_parameters``; llama.cpp divides by ``rope_freqs``).
    """
    scaling = config.rope_scaling
    if scaling is None:
        return None
    width = config.head_dim
    frequency = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / (kept + (1 - kept) / scaling["factor"])
    return factors.float()


def tensor_type(name: str, tensor: Tensor, quantize: str | None) -> Any:
    """The type that a tensor is written in (a ``GGMLQuantizationType``).

    Embeddings and head keep eight bits also in a 4-bit file, as llama.cpp's own 4-bit files keep six there.
    """
    kinds = gguf_package().GGMLQuantizationType
    if tensor.dim() == 1 or ("embd" in name and name.startswith("v.")):
        return kinds.F32
    if quantize is None or tensor.shape[-1] % BLOCK:
        return kinds[TYPES[tensor.dtype]]
    return kinds.Q8_0 if name in ("token_embd.weight", "output.weight") else kinds[QUANTIZED[quantize]]
