"""Checkpoint folders: Hugging Face's names and layout, which transformers loads, or FMS's own."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch

from smolvlm_fms.export.checks import Check, compare, for_checking, make_cases, own_forward, same_tensors
from smolvlm_fms.export.output import copy_processor_files
from smolvlm_fms.export.targets import weight_bytes
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.fms_bridge.saving import save_pretrained

__all__ = ["FmsFolder", "HfFolder"]


class _Folder:
    """``config.json``, safetensors and the processor's files."""

    dtype: torch.dtype | None = None

    source_name: str

    def expected_bytes(self, model: Any) -> int:
        return weight_bytes(model)

    def write(self, model: Any, source: Path, out: Path) -> None:
        save_pretrained(model, out, source=self.source_name)
        copy_processor_files(source, out)

    def check(self, model: Any, source: Path, out: Path) -> list[Check]:
        again = load_model(out)
        checks = [same_tensors("weights read again", model.state_dict(), again.state_dict())]
        del again
        model = for_checking(model)
        return checks + self._others(model, source, out)

    def _others(self, model: Any, source: Path, out: Path) -> list[Check]:
        """What the software that the folder is meant for makes of it."""
        raise NotImplementedError


class HfFolder(_Folder):
    """What transformers loads."""

    source_name = "hf"

    def _others(self, model: Any, source: Path, out: Path) -> list[Check]:
        if importlib.util.find_spec("transformers") is None:
            return [Check("transformers", None, 1.0, True, "not installed, so not compared")]
        from smolvlm_fms.hf.peer import sees_pictures_right, transformers_forward

        cases = make_cases(source, model.config)
        if not sees_pictures_right():
            cases = [case for case in cases if "pixel_values" not in case.inputs]
        model.text_model.logits_divisor = 1.0  # transformers leaves Granite's out; this compares everything else
        forward = transformers_forward(out, next(model.parameters()).dtype)
        return compare(model, forward, cases, what="transformers, ")


class FmsFolder(_Folder):
    """What ``get_model(…, model_path=out, source="fms")`` loads."""

    source_name = "fms"

    def _others(self, model: Any, source: Path, out: Path) -> list[Check]:
        from fms.models import get_model

        architecture = architecture_of(model.config.model_type)
        fields = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
        variant = variant_of(model.config)
        dtype = next(model.parameters()).dtype
        theirs = get_model(
            architecture.name, variant or next(iter(architecture.presets)), str(out), source="fms",
            device_type="cpu", data_type=dtype, **({} if variant else fields),
        )  # fmt: skip
        cases = make_cases(source, model.config)
        with torch.no_grad():
            return compare(model, own_forward(theirs.eval()), cases, what="get_model, ")


def variant_of(config: Any) -> str | None:
    """The registered variant that builds this very model; None where there is none of its shape."""
    architecture = architecture_of(config.model_type)
    free = {"dtype": None, "fused_weights": True}
    for name, preset in architecture.presets.items():
        if preset.updated(**free) == config.updated(**free):
            return name
    return None
