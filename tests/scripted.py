"""A model that reads from a script: the engine, tokenizer and processor are real, only what computes is not.

    vlm = scripted_vlm(build_docling_checkpoint(tmp_path), {0: "<doctag>…", 128: Say("…")})

Which script a page gets is decided by the grey that most of it has, so that pictures must have been drawn, cut and
handed over rightly for the right words to come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import torch

import smolvlm_fms as sv
from smolvlm_fms.engine.config import BLOCK
from smolvlm_fms.engine.sequence import Picture, Sampled, Sequence
from tests.tiny import build_processor_files
from tests.tiny_models import build_checkpoint

_NAMES = (
    "text", "section_header_level_1", "list_item", "unordered_list", "ordered_list", "otsl", "picture", "formula",
    "code", "caption", "page_header", "page_footer",
)  # fmt: skip
DOCLING_TOKENS = (
    "<doctag>", "</doctag>", *(f"<{slash}{name}>" for name in _NAMES for slash in ("", "/")),
    "<fcel>", "<ecel>", "<lcel>", "<ucel>", "<xcel>", "<ched>", "<rhed>", "<nl>", "<_Python_>", "<bar_chart>",
    *(f"<loc_{step}>" for step in range(501)),
)  # fmt: skip


def build_docling_checkpoint(folder: Path, *, context: int = 2048) -> Path:
    """A tiny random Idefics3 checkpoint with Docling's special tokens."""
    build_checkpoint(
        folder, "idefics3", text={"vocab_size": 464 + len(DOCLING_TOKENS), "max_position_embeddings": context}
    )
    build_processor_files(
        folder, model_type="idefics3", tile=32, longest_edge=64, image_seq_len=1, extra_tokens=DOCLING_TOKENS
    )
    return folder


class ScriptedBackend:
    """Says what the script has for the picture's grey; an exception in it is raised at the tower."""

    kv_bytes_per_token = 8

    def __init__(self, scripts: Mapping[int, list[int] | Exception], end: int, kv_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        self.scripts = scripts
        self.end = end
        self.known: dict[bytes, list[int]] = {}  # a picture seen before may not be encoded again
        self.greys: list[int] = []
        self.widest = 0

    def copy(self, source: int, target: int, tokens: int) -> None: ...

    def encode(self, picture: Picture, first: int, count: int) -> None:
        pixels, _ = picture.resolve()
        if first + count == picture.tiles:
            grey = round(float(torch.as_tensor(pixels[:]).float().median()) * 127.5 + 127.5)
            script = self.scripts[min(self.scripts, key=lambda one: abs(one - grey))]
            self.greys.append(grey)
            if isinstance(script, Exception):
                raise script
            self.known[picture.key] = picture.features = script

    def feature_bytes(self, picture: Picture) -> int:
        return 8

    def prefill(self, sequence: Sequence, start: int, count: int) -> Sampled | None:
        if start + count < len(sequence.prompt):
            return None
        sequence.script = self.known[sequence.pictures[0].key]  # type: ignore[attr-defined]
        return self._next(sequence)

    def decode(self, sequences: SequenceOf[Sequence]) -> list[Sampled]:
        self.widest = max(self.widest, len(sequences))
        return [self._next(sequence) for sequence in sequences]

    def _next(self, sequence: Sequence) -> Sampled:
        script, at = sequence.script, len(sequence.output)  # type: ignore[attr-defined]
        return Sampled(script[at] if at < len(script) else self.end)


def scripted_vlm(folder: Path, scripts: Mapping[int, str | Exception], **config: Any) -> sv.VLM:
    """``sv.load(folder)`` with a backend that answers from ``scripts`` (grey 0 … 255 to text, or what it raises)."""
    real = sv.load(folder)
    tokenizer = real.processor.tokenizer
    ids = {
        grey: script if isinstance(script, Exception) else tokenizer.encode(script, add_special_tokens=False)
        for grey, script in scripts.items()
    }
    backend = ScriptedBackend(ids, real.defaults.stop_tokens[0], kv_tokens=512 * BLOCK)
    engine = sv.EngineConfig(**config)
    return sv.VLM(real.model, real.processor, backend, real.defaults, engine, name=str(folder))
