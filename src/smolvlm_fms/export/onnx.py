"""ONNX in the layout that transformers.js and optimum use, made by ``torch.export`` and run with onnxruntime.

    OUT/config.json, tokenizer and processor files
    OUT/onnx/vision_encoder.onnx         pixel_values, pixel_attention_mask ─▶ image_features
    OUT/onnx/embed_tokens.onnx           input_ids ─▶ inputs_embeds
    OUT/onnx/decoder_model_merged.onnx   inputs_embeds, attention_mask, position_ids, past_key_values.N.key/value
                                         ─▶ logits, present.N.key/value

Merged: the one decoder takes a prompt (a past of length 0) and single tokens alike. All axes of batch, tiles, tokens
and past are free. Numbers are fp32.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolvlm_fms.errors import ConfigurationError, MissingDependencyError
from smolvlm_fms.export.checks import Check, Inputs, compare, greedy, make_cases
from smolvlm_fms.export.onnx_modules import Decoder, Embedding, VisionEncoder
from smolvlm_fms.export.output import copy_processor_files
from smolvlm_fms.export.targets import weight_bytes
from smolvlm_fms.fms_bridge.saving import hf_state_dict

__all__ = ["OnnxFolder", "OnnxModel"]

OPSET = 20
INLINE_BYTES = 3 << 29
"""Larger weights (1.5 GB) go into a file beside the graph: a protobuf cannot hold more than 2 GB."""


class OnnxFolder:
    """Three graphs and the processor's files."""

    dtype: torch.dtype | None = torch.float32

    def __init__(self) -> None:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not _installed(name)]
        if missing:
            raise MissingDependencyError(f"ONNX needs {', '.join(missing)}: pip install 'smolvlm-fms[onnx]'.")

    def expected_bytes(self, model: Any) -> int:
        twice: int = model.text_model.head.weight.numel() if model.config.tie_word_embeddings else 0
        return weight_bytes(model) + 4 * twice

    def write(self, model: Any, source: Path, out: Path) -> None:
        config = model.config
        if not hasattr(config, "scale_factor"):
            raise ConfigurationError("Only SmolVLM and Idefics3 can be written as ONNX; LLaVA-Next cannot yet.")
        if next(model.parameters()).dtype != torch.float32:
            raise ConfigurationError("ONNX is written in float32; leave --dtype out.")
        (out / "onnx").mkdir()
        state = hf_state_dict(model)
        large = [
            name for name, parts in _graphs(state, config).items() if _export(parts, out / "onnx" / f"{name}.onnx")
        ]
        values = config.updated(dtype="float32").to_hf()
        if large:
            values["transformers.js_config"] = {"use_external_data_format": {f"{name}.onnx": True for name in large}}
        (out / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        copy_processor_files(source, out)

    def check(self, model: Any, source: Path, out: Path) -> list[Check]:
        runs = OnnxModel(out)
        cases = make_cases(source, model.config)
        checks = compare(model, runs.forward, cases, what="onnxruntime, ")
        for case in cases:
            inputs, length = greedy(model, case.inputs)
            wanted = inputs["input_ids"][0, length:].tolist()
            found = runs.generate(case.inputs, len(wanted))
            agree = sum(a == b for a, b in zip(wanted, found, strict=True)) / len(wanted)
            checks.append(Check(f"onnxruntime, {case.name}: text by its cache", None, agree, wanted == found))
        return checks


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _graphs(state: dict[str, Tensor], config: Any) -> dict[str, tuple[Any, ...]]:
    """By file name: the module, example arguments, which of their axes are free, names of inputs and of outputs."""
    free = torch.export.Dim.DYNAMIC
    side, text = config.vision.image_size, config.text
    pixels = torch.zeros(2, 3, config.vision.num_channels, side, side)
    mask = torch.ones(2, 3, side, side, dtype=torch.bool)
    layers = range(text.num_hidden_layers)
    past = [tuple(torch.zeros(2, text.num_key_value_heads, 5, text.head_dim) for _ in "kv") for _ in layers]
    new, total = torch.zeros(2, 3, text.hidden_size), torch.ones(2, 8, dtype=torch.long)
    positions = torch.arange(5, 8).expand(2, 3).contiguous()
    tokens = {0: free, 1: free}
    names = [f"{i}.{kind}" for i in layers for kind in ("key", "value")]
    return {
        "vision_encoder": (
            VisionEncoder(state, config), (pixels, mask), (tokens, tokens),
            ["pixel_values", "pixel_attention_mask"], ["image_features"],
        ),
        "embed_tokens": (Embedding(state), (positions,), (tokens,), ["input_ids"], ["inputs_embeds"]),
        "decoder_model_merged": (
            Decoder(state, config), (new, total, positions, past),
            (tokens, tokens, tokens, [({0: free, 2: free}, {0: free, 2: free}) for _ in layers]),
            ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
            ["logits", *(f"present.{name}" for name in names)],
        ),
    }  # fmt: skip


def _export(parts: tuple[Any, ...], file: Path) -> bool:
    """Write one graph; whether its weights went into a file of their own."""
    module, arguments, axes, inputs, outputs = parts
    large: bool = sum(weight.numel() * weight.element_size() for weight in module.parameters()) > INLINE_BYTES
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(), arguments, dynamo=True, opset_version=OPSET, dynamic_shapes=axes, input_names=inputs,
            output_names=outputs, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(file), external_data=large)
    return large


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecations and logs every pass; none of it is about the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class OnnxModel:
    """The three graphs in ``folder``, run by onnxruntime as its users run them."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._vision, self._embed, self._decoder = (
            onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        self._image_token = json.loads((folder / "config.json").read_text(encoding="utf-8"))["image_token_id"]
        self._past = {i.name: i.shape for i in self._decoder.get_inputs() if i.name.startswith("past_key_values.")}

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, T, V) of a prompt."""
        return self._step(self._embeddings(inputs), inputs["attention_mask"].numpy(), None)[0]

    def generate(self, inputs: Inputs, tokens: int) -> list[int]:
        """Greedy tokens of one prompt: its keys and values go from step to step."""
        mask = inputs["attention_mask"].numpy()
        logits, past = self._step(self._embeddings(inputs), mask, None)
        found: list[int] = []
        while True:
            found.append(int(logits[0, -1].argmax()))
            if len(found) == tokens:
                return found
            mask = np.concatenate((mask, np.ones((1, 1), mask.dtype)), 1)
            embedded = self._embed.run(None, {"input_ids": np.array([[found[-1]]], np.int64)})[0]
            logits, past = self._step(embedded, mask, past)

    def _embeddings(self, inputs: Inputs) -> Any:
        ids = inputs["input_ids"].numpy()
        embedded = self._embed.run(None, {"input_ids": ids})[0]
        if "pixel_values" in inputs:
            pixels, mask = inputs["pixel_values"].float().numpy(), inputs["pixel_attention_mask"].bool().numpy()
            (features,) = self._vision.run(None, {"pixel_values": pixels, "pixel_attention_mask": mask})
            embedded[ids == self._image_token] = features.reshape(-1, features.shape[-1])
        return embedded

    def _step(self, embedded: Any, mask: Any, past: list[Any] | None) -> tuple[Tensor, list[Any]]:
        if past is None:
            past = [np.zeros((len(mask), shape[1], 0, shape[3]), np.float32) for shape in self._past.values()]
        positions = (mask.cumsum(1) - 1).clip(min=0)[:, -embedded.shape[1] :]
        feed = {"inputs_embeds": embedded, "attention_mask": mask.astype(np.int64), "position_ids": positions}
        logits, *present = self._decoder.run(None, feed | dict(zip(self._past, past, strict=True)))
        return torch.from_numpy(logits), present
