"""The CPU kernels against torch's operators and this machine's ceilings, in one run.

    python benchmarks/kernels.py [--repeats 15] [--threads 2] [--isa avx512] [--shape 256m] [--quick]

Contestants take turns, so that a busy machine slows all of them; compare the ratios. Times are the calling thread's own
processor time with one thread (which other programs disturb little) and wall time with more. The last line is one JSON
object: milliseconds (median, min, max) of ours and of torch, the ratio of the minima, and the share of the ceiling that
bounds the kernel: the measured bf16 matrix product, or the measured memory read for one decode step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvlm_fms.engine import kernels


@dataclass(frozen=True)
class Shape:
    """Sizes of one model: tower width, heads, patches and hidden size, then those of the text model."""

    tower: tuple[int, int, int, int]
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocabulary: int = 49280


SHAPES = {
    "256m": Shape((768, 12, 1024, 3072), 576, 30, 9, 3, 64, 1536),
    "500m": Shape((768, 12, 1024, 3072), 960, 32, 15, 5, 64, 2560),
    "2.2b": Shape((1152, 16, 729, 4304), 2048, 24, 32, 32, 64, 8192),
}


class Clock:
    """Times contestants in turns."""

    def __init__(self, repeats: int, threads: int) -> None:
        self.repeats = repeats
        self.now = time.thread_time if threads == 1 else time.perf_counter

    def turns(self, **contestants: Callable[[], Any]) -> dict[str, dict[str, float]]:
        """Milliseconds of each, median, min and max."""
        for run in contestants.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(self.repeats):
            for name, run in contestants.items():
                start = self.now()
                run()
                times[name].append(1e3 * (self.now() - start))
        return {
            name: {"median": statistics.median(all_), "min": min(all_), "max": max(all_)}
            for name, all_ in times.items()
        }


def ceilings() -> dict[str, Callable[[], Any]]:
    """A square bf16 product of 2 GFLOP, and a sum over 128 MB."""
    a = torch.randn(1024, 1024).bfloat16()
    memory = torch.ones(32 * 2**20)
    return {"gemm": lambda: a @ a, "read": lambda: memory.sum()}


def with_shares(times: dict[str, dict[str, float]], flop: float = 0.0, read: float = 0.0) -> dict[str, Any]:
    """Adds the ratio to torch and the shares of the ceilings that were measured in the same turns."""
    row: dict[str, Any] = dict(times)
    ours = times["ours"]["min"]
    if "torch" in times:
        row["torch_over_ours"] = times["torch"]["min"] / ours
    if flop:
        row["share_of_gemm"] = flop / ours / (2 * 1024**3 / times["gemm"]["min"])
    if read:
        row["share_of_read"] = read / ours / (128 * 2**20 / times["read"]["min"])
    return row


def linears(shape: Shape, clock: Clock) -> dict[str, Any]:
    """The tower's four linears together, bf16 and W8A8, one tile."""
    width, _, patches, hidden = shape.tower
    sizes = [(3 * width, width, "none"), (width, width, "none"), (hidden, width, "gelu_tanh"), (width, hidden, "none")]
    weights = [torch.randn(n, k) * 0.02 for n, k, _ in sizes]
    inputs = [torch.randn(patches, k).bfloat16() for _, k, _ in sizes]
    halves = [weight.bfloat16() for weight in weights]

    def by_torch() -> None:
        for (_, _, activation), weight, x in zip(sizes, halves, inputs, strict=True):
            y = F.linear(x, weight)
            if activation == "gelu_tanh":
                F.gelu(y, approximate="tanh")

    def ours(kind: str) -> Callable[[], Any]:
        packed = [kernels.PackedLinear(w, kind=kind, activation=a) for w, (_, _, a) in zip(weights, sizes, strict=True)]
        return lambda: [linear(x) for linear, x in zip(packed, inputs, strict=True)]

    flop = sum(2.0 * patches * n * k for n, k, _ in sizes)
    return {
        f"tower_linears_{kind}": with_shares(clock.turns(ours=ours(kind), torch=by_torch, **ceilings()), flop)
        for kind in ("bf16", "int8_channel")
    }


def attention(shape: Shape, clock: Clock) -> dict[str, Any]:
    """One tower layer's attention, one tile; one text layer's causal attention at the end of 1,128 tokens."""
    width, heads, patches, _ = shape.tower
    qkv = torch.randn(1, patches, 3, heads, width // heads).bfloat16()
    separate = qkv.permute(2, 0, 3, 1, 4)
    tower = clock.turns(
        ours=lambda: kernels.vision_attention(qkv),
        torch=lambda: F.scaled_dot_product_attention(*separate),
        **ceilings(),
    )
    tokens, d = 1128, shape.head_dim
    rows = torch.randn(tokens, (shape.heads + 2 * shape.kv_heads) * d).bfloat16()
    cache = kernels.PackedCache(1, shape.kv_heads, d, 2048)
    cos, sin = kernels.rope_tables(10000.0 ** (-torch.arange(0, d, 2) / d), 2048)
    parts = rows.view(1, tokens, -1, d).transpose(1, 2).split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    causal = clock.turns(
        ours=lambda: kernels.causal_attention(rows, cache, cos, sin, heads=shape.heads, layer=0, start=0, position=0),
        torch=lambda: F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True),
        **ceilings(),
    )
    return {
        "tower_attention": with_shares(tower, 4.0 * patches * patches * width),
        "causal_attention": with_shares(causal, 2.0 * tokens * tokens * shape.heads * d),
    }


def text_model(shape: Shape, kind: str) -> tuple[kernels.PackedText, list[Tensor]]:
    """A random model, and its matrices in bf16 as torch would multiply them."""
    inner, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [(inner + 2 * kv, shape.width), (shape.width, inner), (2 * shape.ff, shape.width), (shape.width, shape.ff)]
    ones, plain, layers = torch.ones(shape.width), [], []
    for _ in range(shape.layers):
        raw = [torch.randn(n, k).bfloat16() * 0.02 for n, k in sizes]
        plain += raw
        activations = ["none", "none", "swiglu", "none"]
        packed = [kernels.PackedLinear(w, kind=kind, activation=a) for w, a in zip(raw, activations, strict=True)]
        layers.append(kernels.PackedLayer(*packed, ones, ones))
    plain.append(torch.randn(shape.vocabulary, shape.width).bfloat16() * 0.02)
    head = kernels.PackedLinear(plain[-1], kind="int8" if kind == "int4" else kind)
    cos, sin = kernels.rope_tables(1e5 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim), 2048)
    sizes_of_heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    return kernels.PackedText(layers, ones, head, cos=cos, sin=sin, eps=1e-5, **sizes_of_heads), plain


def weight_bytes(model: kernels.PackedText) -> float:
    parts = [p for layer in model.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)] + [model.head]
    tensors = [t for part in parts for t in (part.packed, part.scales) if t is not None]
    return float(sum(t.numel() * t.element_size() for t in tensors))


RUN = 1216  # cache positions of one sequence: 1,128 and some to spare, in whole blocks


def text(shape: Shape, clock: Clock, kind: str, batches: list[int]) -> dict[str, Any]:
    """A prefill of 1,128 tokens and decode steps; torch's part of a step is its bare matrix products."""
    model, plain = text_model(shape, kind)
    cache = model.new_cache(RUN * max(batches))
    hidden = torch.randn(1128, shape.width).bfloat16()
    parameters = sum(float(w.numel()) for w in plain)
    times = clock.turns(ours=lambda: model.prefill(hidden, 0, 0, cache), **ceilings())
    attended = 1128.0 * shape.layers * shape.heads * shape.head_dim
    row = with_shares(times, 2.0 * 1128 * (parameters - plain[-1].numel() + attended))
    row["tokens_per_second"] = 1128 / times["ours"]["min"] * 1e3
    rows = {f"prefill_{kind}_1128": row}
    for sequence in range(1, max(batches)):
        cache.copy(0, RUN * sequence, 1128)  # so that steps read real memory

    def step(batch: int, position: int) -> dict[str, Any]:
        places = torch.full((batch,), position), RUN * torch.arange(batch)
        inputs = [torch.randn(batch, w.shape[1]).bfloat16() for w in plain]
        times = clock.turns(
            ours=lambda: model.decode(hidden[:batch], *places, cache),
            torch=lambda: [F.linear(x, w) for x, w in zip(inputs, plain, strict=True)],
            **ceilings(),
        )
        row = with_shares(times, 2.0 * batch * parameters, weight_bytes(model))
        row["tokens_per_second"] = batch / times["ours"]["min"] * 1e3
        return row

    for position in (10, 1128):
        rows |= {f"decode_{kind}_batch{batch}_at{position}": step(batch, position) for batch in batches}
    return rows


def compact(shape: Shape, clock: Clock, batches: list[int]) -> dict[str, Any]:
    """bf16 weights in 12 bits beside plain ones, of the same size."""
    ours, plain = (text_model(shape, kind)[0] for kind in ("bf16_compact", "bf16"))
    cache = ours.new_cache(RUN * max(batches))
    hidden = torch.randn(1128, shape.width).bfloat16()

    def beside(run: Callable[[kernels.PackedText], Any]) -> dict[str, Any]:
        times = clock.turns(ours=lambda: run(ours), plain=lambda: run(plain))
        return {**times, "plain_over_ours": times["plain"]["median"] / times["ours"]["median"]}

    def step(batch: int, position: int) -> dict[str, Any]:
        places = torch.full((batch,), position), RUN * torch.arange(batch)
        return beside(lambda model: model.decode(hidden[:batch], *places, cache))

    rows = {"compact_prefill_1128": beside(lambda model: model.prefill(hidden, 0, 0, cache))}
    for sequence in range(1, max(batches)):
        cache.copy(0, RUN * sequence, 1128)
    return rows | {f"compact_batch{batch}_at{at}": step(batch, at) for at in (32, 1127) for batch in batches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=kernels.isa(), help="avx512, avx2, neon or portable")
    parser.add_argument("--shape", default="256m", choices=[*SHAPES])
    parser.add_argument("--quick", action="store_true", help="tower and bf16 at batch 1, few repeats")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock, shape = Clock(3 if options.quick else options.repeats, options.threads), SHAPES[options.shape]
    kinds, batches = (["bf16"], [1]) if options.quick else (["bf16", "int8", "int4"], [1, 2, 4, 8, 32])
    with torch.inference_mode(), kernels.use_isa(options.isa):
        rows = {**attention(shape, clock), **linears(shape, clock)}
        for kind in kinds:
            rows |= text(shape, clock, kind, batches)
        if options.isa == "avx512":
            rows |= compact(shape, clock, batches)
    for name, row in rows.items():
        figures = [f"{row['ours']['min']:9.2f} ms"]
        figures += [
            f"{key} {row[key]:.2f}"
            for key in ("torch_over_ours", "share_of_gemm", "share_of_read", "plain_over_ours")
            if key in row
        ]
        figures += [f"{row['tokens_per_second']:.0f} tok/s"] if "tokens_per_second" in row else []
        print(f"{name:28s}", *figures, sep="  ")
    machine = {"processor": platform.processor() or platform.machine(), "threads": options.threads, "isa": options.isa}
    print(json.dumps({"machine": machine, "versions": {"torch": torch.__version__}, "shape": options.shape, **rows}))


if __name__ == "__main__":
    main()
