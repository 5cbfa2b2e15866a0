"""Processes that measure one engine each: commands come as JSON lines, seconds go back. Run by ``engine.py``.

A process an engine keeps their memory, threads and caches apart; the parent asks them in turn, so that a noisy minute
hits all of them alike.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_checkpoint import PICTURE, SMALL_PICTURE

VOCABULARY = 400
PROMPT_17_TILES = 1128
CLOCK = time.process_time if os.environ.get("BENCHMARK_CLOCK") == "cpu" else time.perf_counter


class Ours:
    """Our engine, in bf16, int8 or int4; with ``SMOLVLM_KERNELS`` naming no library, its fallback."""

    def __init__(self, folder: Path, quantize: str | None, quantize_tower: str | None) -> None:
        import torch

        import smolvlm_fms as sv

        self.torch = torch
        self.vlm = sv.load(folder, dtype="bfloat16", quantize=quantize, quantize_tower=quantize_tower)
        self.backend: Any = self.vlm.engine.backend
        side = self.vlm.model.config.vision.image_size
        self.tile = torch.rand(1, 3, side, side) * 2 - 1

    def about(self) -> dict[str, Any]:
        from smolvlm_fms.engine import kernels

        return {"backend": type(self.backend).__name__, "isa": kernels.isa(), "torch": self.torch.__version__}

    def tower(self) -> float:
        with self.torch.inference_mode():
            return timed(lambda: self.backend.tower(self.tile))

    def prefill(self, tokens: int = PROMPT_17_TILES) -> float:
        sequence = self._sequence(0, tokens, 1)
        return timed(lambda: self.backend.prefill(sequence, 0, tokens))

    def decode(self, context: int, steps: int, batch: int = 1) -> float:
        """Seconds for ``steps`` tokens of each of ``batch`` sequences that begin with ``context`` tokens."""
        sequences = []
        for row in range(batch):
            sequence = self._sequence(row, context, steps + 1)
            first = self.backend.prefill(sequence, 0, context)
            sequence.output.append(first.token)
            sequence.computed = context
            sequences.append(sequence)

        def run() -> None:
            for _ in range(steps):
                for sequence, sampled in zip(sequences, self.backend.decode(sequences), strict=True):
                    sequence.output.append(sampled.token)
                    sequence.computed += 1

        return timed(run)

    def ttft(self) -> float:
        """Seconds from the call to the first token for a picture that was never seen: 17 tiles."""
        self.vlm.engine.images.clear()
        self.vlm.engine.space.clear_prefixes()
        return self._ask("What is in the picture?", cached=False)

    def ttft_again(self) -> float:
        """The same for a second question on the same picture."""
        question = f"How many cats are there, on table {time.time_ns()}?"
        return self._ask(question, cached=True)

    def _ask(self, question: str, cached: bool) -> float:
        answers: list[Any] = []
        seconds = timed(lambda: answers.append(self.vlm.ask(PICTURE, question, max_tokens=1, ignore_eos=True)))
        usage = answers[0].usage
        assert usage.image_tokens == 17 * 64 and (usage.cached_tokens > 17 * 64) == cached, usage
        return seconds

    def gemm(self) -> float:
        """Best bf16 GFLOP/s of large matrix products, by torch's oneDNN and by our own kernel: the ceiling."""
        from smolvlm_fms.engine.linears import OneDnnLinear, make_linear

        best = 0.0
        for rows, inputs, outputs in ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048)):
            x, weight = self.torch.randn(rows, inputs).bfloat16(), self.torch.randn(outputs, inputs).bfloat16()
            for linear in (OneDnnLinear(weight), make_linear(weight)):
                work = functools.partial(linear, x)
                work()
                seconds = min(timed(work) for _ in range(5))
                best = max(best, 2e-9 * rows * inputs * outputs / seconds)
        return best

    def _sequence(self, row: int, context: int, steps: int) -> Any:
        from smolvlm_fms.engine.options import GenerationOptions
        from smolvlm_fms.engine.sequence import Extent, Sequence, content_symbols

        generator = self.torch.Generator().manual_seed(row)
        prompt = self.torch.randint(20, VOCABULARY, (context,), generator=generator).tolist()
        room = -(-(context + steps) // 64) * 64
        return Sequence(
            id=row,
            prompt=prompt,
            options=GenerationOptions(max_tokens=steps),
            pictures=[],
            stop_tokens=frozenset(),
            seed=0,
            symbols=content_symbols(prompt, []),
            sink=lambda event: None,
            extent=Extent(row * room, room),
        )


class Transformers:
    """transformers in bf16 with scaled dot-product attention, eager: what its documentation shows."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        from smolvlm_fms.hf.reference import reference_processor

        self.torch, self.transformers = torch, transformers
        self.model = transformers.SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.processor = reference_processor(folder)
        side = self.model.config.vision_config.image_size
        self.tile = (torch.rand(1, 1, 3, side, side) * 2 - 1).bfloat16()

    def about(self) -> dict[str, Any]:
        return {"transformers": self.transformers.__version__, "torch": self.torch.__version__, "attention": "sdpa"}

    def tower(self) -> float:
        with self.torch.inference_mode():
            return timed(lambda: self.model.model.get_image_features(self.tile))

    def prefill(self, tokens: int = PROMPT_17_TILES) -> float:
        ids = self.torch.randint(20, VOCABULARY, (1, tokens))
        with self.torch.inference_mode():
            return timed(lambda: self.model(input_ids=ids, use_cache=True, logits_to_keep=1))

    def decode(self, context: int, steps: int, batch: int = 1) -> float:
        ids = self.torch.randint(20, VOCABULARY, (batch, context))
        with self.torch.inference_mode():
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            token = out.logits[:, -1:].argmax(-1)

            def run() -> None:
                nonlocal token
                for _ in range(steps):
                    out = self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token = out.logits[:, -1:].argmax(-1)

            return timed(run)

    def ttft(self) -> float:
        from PIL import Image

        def run() -> None:
            chat = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}
            ]
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
            with Image.open(PICTURE) as picture:
                inputs = self.processor(text=[text], images=[[picture.convert("RGB")]], return_tensors="pt")
            assert inputs["pixel_values"].shape[1] == 17
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
            with self.torch.inference_mode():
                self.model.generate(**inputs, do_sample=False, max_new_tokens=1)

        return timed(run)


def timed(work: Any) -> float:
    """Seconds that ``work()`` takes."""
    started = CLOCK()
    work()
    return CLOCK() - started


def cold_start(folder: Path) -> None:
    """A whole process: load, look at a small picture, say when the first token is there."""
    import smolvlm_fms as sv

    vlm = sv.load(folder, dtype="bfloat16")
    for _ in vlm.engine.submit(*_small_prompt(vlm)):
        print("first token", flush=True)
        break


def _small_prompt(vlm: Any) -> tuple[Any, Any, Any]:
    from smolvlm_fms.engine.options import GenerationOptions

    parts = [{"type": "image", "image": SMALL_PICTURE}, {"type": "text", "text": "What is this?"}]
    prompt = vlm.preparer.chat([{"role": "user", "content": parts}], "low")
    return prompt.tokens, prompt.pictures, GenerationOptions(max_tokens=1, ignore_eos=True)


def peak_bytes() -> int:
    """Most memory that this process has had resident, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def serve(make: Callable[[], Any]) -> None:
    """Make a worker and have it obey commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers
    worker: Any = make()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        result = peak_bytes() if name == "peak" else getattr(worker, name)(**command)
        answers.write(json.dumps(result) + "\n")
        answers.flush()


def main() -> None:
    """``engine_workers.py KIND FOLDER``: serve commands until the input ends."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "cold":
        cold_start(folder)
        return

    def memory(quantize: str | None) -> Any:
        from engine_memory import Memory

        return Memory(folder, quantize)

    makers: dict[str, Callable[[], Any]] = {
        "bf16": lambda: Ours(folder, None, None),
        "int8": lambda: Ours(folder, "int8", "int8"),
        "int4": lambda: Ours(folder, "int4", None),
        "fallback": lambda: Ours(folder, None, None),
        "transformers": lambda: Transformers(folder),
        "memory_bf16": lambda: memory(None),
        "memory_int8": lambda: memory("int8"),
        "memory_int4": lambda: memory("int4"),
    }
    serve(makers[kind])


if __name__ == "__main__":
    main()
