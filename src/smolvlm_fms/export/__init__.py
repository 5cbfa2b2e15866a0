"""From a checkpoint to other software's formats: transformers, FMS, llama.cpp (GGUF), ONNX, our own quantised folder.

source (folder, hub id, run, adapter) ─▶ model ─▶ writer of the target ─▶ parity check ─▶ rename into place

A room of its own: it stands over checkpoints (``fms_bridge``), the engine's packed weights and transformers (``hf``) at
once, which no other room may, and nothing but the command line stands on it.
"""

from __future__ import annotations

from smolvlm_fms.export.convert import TARGETS, Conversion, convert

__all__ = ["TARGETS", "Conversion", "convert"]
