"""Peak memory of a process whose cache of keys and values is really full. Run through ``engine.py --memory``.

    a picture of 17 tiles ─▶ one prompt as long as the context ─▶ as many sequences at once as fill the cache
    ─▶ the long prompt again, now that the cache is full ─▶ a picture again (told apart)

The goal is 1.25 times the weights, plus the budget of keys and values, plus 200 MB for everything else: torch, the
tower's and the prefill's buffers, pixels, features.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

from engine_checkpoint import PICTURE
from engine_workers import VOCABULARY, peak_bytes

ANSWER = BLOCK = 64
ALLOWANCE = 200_000_000


class Memory:
    """One process: our engine with its default sizes, and what it is asked to do."""

    def __init__(self, folder: Path, quantize: str | None) -> None:
        import torch

        import smolvlm_fms as sv

        self.torch = torch
        self.weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self.vlm = sv.load(folder, dtype="bfloat16", quantize=quantize)
        self.after = {"loading": peak_bytes(), "loaded": resident_bytes()}

    def fill(self) -> dict[str, Any]:
        """Fill the cache; bytes, and the share of the cache's pages that are in memory afterwards."""
        engine = self.vlm.engine
        self.vlm.ask(PICTURE, "What is in the picture?", max_tokens=8, ignore_eos=True)
        self.after["picture"] = peak_bytes()
        self._run(1, min(engine.context_length, engine.space.capacity) - ANSWER)
        self.after["long prompt"] = peak_bytes()
        blocks = engine.space.capacity // BLOCK
        rows = max(n for n in range(1, engine.config.max_sequences + 1) if not blocks % n)  # nothing is left over
        self._run(rows, blocks // rows * BLOCK - ANSWER)
        self.after["full cache"] = peak_bytes()
        self._run(1, min(engine.context_length, engine.space.capacity) - ANSWER)  # on a cache that stays full
        self.after["long prompt, cache full"] = peak_bytes()
        picture = self._pictures_peak()
        backend: Any = engine.backend
        budget = backend.kv_tokens * backend.kv_bytes_per_token
        bound = int(1.25 * self.weights) + budget + ALLOWANCE
        return {
            "weights_bytes": self.weights,
            "kv_budget_bytes": budget,
            "kv_resident_share": _resident_share([backend.cache.keys, backend.cache.values]),
            "bound_bytes": bound,
            "peak_bytes": self.after["long prompt, cache full"],
            "peak_bytes_with_a_picture": picture,
            "share_of_bound": self.after["long prompt, cache full"] / bound,
            "peak_bytes_after": self.after,
        }

    def _pictures_peak(self) -> int:
        """The peak when a picture of 17 tiles comes while the cache is full: its file, its pixels, its tiles."""
        self.vlm.engine.images.clear()
        self.vlm.preparer._grids.clear()
        stream = self.vlm.stream(PICTURE, "What is this?", max_tokens=1)
        for _ in range(2):
            self.vlm.engine.step()
        stream.cancel()
        return peak_bytes()

    def _run(self, rows: int, prompt: int) -> None:
        """``rows`` sequences at once, none beginning like another."""
        from smolvlm_fms.engine.options import GenerationOptions

        self.vlm.engine.space.clear_prefixes()  # or what is free would lie in pieces
        options = GenerationOptions(max_tokens=ANSWER, ignore_eos=True, loop_detection=False)
        generator = self.torch.Generator().manual_seed(rows)
        ids = self.torch.randint(20, VOCABULARY, (rows, prompt), generator=generator).tolist()
        generations = [self.vlm.engine.submit(row, options=options) for row in ids]
        most = 0
        while self.vlm.engine.step():
            most = max(most, len(self.vlm.engine.scheduler.running))
        assert most == rows, f"{most} of {rows} sequences ran at once"
        assert all(len(generation.sequence.output) == ANSWER for generation in generations)


def resident_bytes() -> int:
    """Memory that this process has resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _resident_share(tensors: list[Any]) -> float:
    """The share of the tensors' pages that are in memory, by the kernel's account."""
    libc, present, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    for tensor in tensors:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        found = (ctypes.c_ubyte * ((last - first) // mmap.PAGESIZE))()
        if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(last - first), found):
            raise OSError(ctypes.get_errno(), "mincore failed")
        pages += len(found)
        present += sum(page & 1 for page in found)
    return present / pages
