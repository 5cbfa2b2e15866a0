"""Our engine beside its peers, on SmolVLM-256M's shapes, in one run: tower, prefill, decode, time to first token.

    python benchmarks/engine.py --quick                      # in two minutes, transformers as the only peer
    python benchmarks/engine.py --peer transformers --peer llamacpp --peer openvino --save

Every engine has a process of its own; they are asked in turn, so that noise hits all alike. The last line of output is
one JSON object: ``machine``, ``versions``, ``ours`` and ``peers`` (median, least and most of each measurement; seconds
or tokens a second as the name says) and ``ratios`` (above 1: we are faster). A peer that is not here is left out,
loudly. On a machine that others use as well, ``--cpu-time --threads 1`` counts processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_checkpoint
from engine_peers import PEERS

HERE = Path(__file__).resolve().parent
PROMPT = 1128
SHORT = 32
PANELS = ("tiles", "frames", "tokens")
KINDS = ("bf16", "int8", "int4")
SETTLE_S = 0.25
"""Pause before each turn: some engines' threads spin after their answer (ONNX Runtime's: 20 ms on both cores), and
whoever came next would pay for it."""


class Worker:
    """A process of ``engine_workers.py``."""

    def __init__(self, kind: str, folder: Path, threads: int, script: str = "engine_workers.py", **env: str) -> None:
        self.kind = kind
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **env}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), kind, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have the process do one thing; raises RuntimeError when it died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The worker {self.kind} died while it did {do!r}.")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Bench:
    """Samples by (worker, measurement), taken in turn."""

    def __init__(self, workers: dict[str, Worker], repeats: int, settle_s: float = 0.0) -> None:
        self.workers = workers
        self.settle_s = settle_s
        self.repeats = repeats
        self.samples: dict[str, dict[str, list[float]]] = {kind: {} for kind in workers}

    def run(
        self, name: str, do: str, kinds: list[str], repeats: int | None = None, amount: float = 0.0, **how: Any
    ) -> None:
        """Measure ``do`` for each kind in turn, after one warm-up. ``amount``: report amount / seconds, not seconds."""
        present = [kind for kind in kinds if kind in self.workers and (kind not in PEERS or do in PEERS[kind].does)]
        for round_ in range((repeats or self.repeats) + 1):
            for kind in present:
                time.sleep(self.settle_s)
                seconds = self.workers[kind].ask(do, **how)
                if round_ or (repeats == 1 and do == "ttft"):
                    value = amount / seconds if amount else seconds
                    self.samples[kind].setdefault(name, []).append(value)
            if repeats == 1 and do == "ttft":
                break
        told = ", ".join(f"{kind} {statistics.median(self.samples[kind][name]):.4g}" for kind in present)
        print(f"{name:24} {told}", file=sys.stderr, flush=True)

    def median(self, kind: str, name: str) -> float | None:
        values = self.samples.get(kind, {}).get(name)
        return statistics.median(values) if values else None

    def report(self, kind: str) -> dict[str, dict[str, float]]:
        return {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values), "samples": len(values)}
            for name, values in self.samples[kind].items()
        }


PARTS = ("tower", "prefill", "decode", "ttft", "cold")


def measure(bench: Bench, quick: bool, parts: Sequence[str] = PARTS) -> None:
    """The named parts, the cheap things first."""
    ours, peers = ["bf16", "int8", "int4"], [kind for kind in bench.workers if kind in PEERS]
    everyone = [*ours, *peers]
    if "tower" in parts:
        bench.run("tower_s", "tower", ["bf16", "int8", "fallback", *peers])
    if "prefill" in parts:
        kinds = ["bf16", "fallback", *everyone[1:]]
        bench.run("prefill_tokens_per_s", "prefill", kinds, amount=PROMPT, tokens=PROMPT)
    if "decode" in parts:
        steps = 32 if quick else 96
        for name, context in (("short", SHORT), ("long", PROMPT)):
            name = f"decode_{name}_tokens_per_s"
            bench.run(name, "decode", everyone, amount=steps, context=context, steps=steps)
        half, name = steps // 2, "decode_batch8_tokens_per_s"
        bench.run(name, "decode", everyone, amount=8 * half, context=SHORT, steps=half, batch=8)
    if "ttft" in parts:
        bench.run("ttft_17_tiles_s", "ttft", ["bf16", "int8", *peers], repeats=1 if quick else min(3, bench.repeats))
        bench.run("ttft_again_s", "ttft_again", ["bf16", "int8"], repeats=3 if quick else 7)


def cold_starts(folder: Path, threads: int, repeats: int) -> list[float]:
    """Seconds from the start of a process to its first token; the first one only warms the disk."""
    values = []
    for _ in range(repeats + 1):
        before, started = _children_seconds(), time.perf_counter()
        worker = Worker("cold", folder, threads)
        assert worker.process.stdout is not None
        first = worker.process.stdout.readline()
        elapsed = time.perf_counter() - started  # the process still has to end, and nobody waits for that
        if worker.process.wait(timeout=300) or not first:
            raise RuntimeError("The cold start failed.")
        values.append(_children_seconds() - before if os.environ.get("BENCHMARK_CLOCK") == "cpu" else elapsed)
    return values[1:]


def _children_seconds() -> float:
    """Processor time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ratios(bench: Bench, ceiling: float, folder: Path) -> dict[str, float]:
    """The named ratios; those whose parts were not measured are left out."""

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    def faster(name: str, kind: str, peer: str) -> float | None:
        """How many times faster than the peer: seconds turn the fraction round."""
        mine, theirs = bench.median(kind, name), bench.median(peer, name)
        return over(theirs, mine) if name.endswith("_s") and not name.endswith("per_s") else over(mine, theirs)

    prefill, batch8, ttft = "prefill_tokens_per_s", "decode_batch8_tokens_per_s", "ttft_17_tiles_s"
    tower = bench.median("bf16", "tower_s")
    found: dict[str, float | None] = {
        "tower_bf16_vs_transformers": faster("tower_s", "bf16", "transformers"),
        "tower_bf16_vs_llamacpp": faster("tower_s", "bf16", "llamacpp"),
        "tower_bf16_vs_openvino": faster("tower_s", "bf16", "openvino"),
        "tower_int8_vs_llamacpp": faster("tower_s", "int8", "llamacpp_q8"),
        "tower_int8_vs_ort": faster("tower_s", "int8", "ort"),
        "tower_bf16_share_of_ceiling": None
        if tower is None
        else engine_checkpoint.tower_flops(folder) / tower / 1e9 / ceiling,
        "prefill_bf16_vs_transformers": faster(prefill, "bf16", "transformers"),
        "prefill_bf16_vs_llamacpp": _least(
            faster(prefill, "bf16", kind) for kind in ("llamacpp", "llamacpp_bf16", "llamacpp_q8", "llamacpp_q4")
        ),
        "decode_batch8_vs_llamacpp": faster(batch8, "bf16", "llamacpp"),
        "fallback_tower_vs_transformers": faster("tower_s", "fallback", "transformers"),
        "fallback_prefill_vs_transformers": faster(prefill, "fallback", "transformers"),
        "ttft_17_tiles_vs_llamacpp": _least(faster(ttft, "bf16", kind) for kind in ("llamacpp", "llamacpp_q8")),
        "ttft_17_tiles_vs_transformers": faster(ttft, "bf16", "transformers"),
        "ttft_cached_speedup": over(bench.median("bf16", ttft), bench.median("bf16", "ttft_again_s")),
        "decode_bf16_short_vs_transformers": faster("decode_short_tokens_per_s", "bf16", "transformers"),
        "decode_bf16_long_vs_transformers": faster("decode_long_tokens_per_s", "bf16", "transformers"),
        "decode_batch8_vs_transformers": faster(batch8, "bf16", "transformers"),
    }
    for mine, theirs in (("bf16", "llamacpp"), ("int8", "llamacpp_q8"), ("int4", "llamacpp_q4")):
        for length in ("short", "long"):
            found[f"decode_{mine}_{length}_vs_llamacpp"] = faster(f"decode_{length}_tokens_per_s", mine, theirs)
    return {name: value for name, value in found.items() if value is not None}


def _least(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return min(present) if present else None


def start_workers(folder: Path, threads: int, peers: list[str], quick: bool) -> dict[str, Worker]:
    """Our own processes and those of the peers that are installed."""
    workers = {kind: Worker(kind, folder, threads) for kind in (("bf16",) if quick else ("bf16", "int8", "int4"))}
    workers["fallback"] = Worker("fallback", folder, threads, SMOLVLM_KERNELS="/nonexistent")
    for peer in peers:
        for kind, engine in PEERS.items():
            if kind.split("_")[0] != peer:
                continue
            reason = engine.missing()
            if reason:
                print(f"*** THE PEER {kind} IS LEFT OUT: {reason}", file=sys.stderr)
                continue
            workers[kind] = Worker(kind, folder, threads, engine.script)
    return workers


def machine(threads: int) -> dict[str, Any]:
    """Enough to read the figures by."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "threads": threads,
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def cost_plot(folder: Path, target: Path, about: dict[str, Any], panels: Sequence[str], save: bool) -> None:
    """Measure how cost grows and draw it; one JSON object on the last line. Panels that are not measured now are taken
    from the saved result of the same day, so that a machine need not be quiet for long."""
    os.environ["OMP_NUM_THREADS"] = str(about["threads"])  # before torch is imported
    import engine_cost

    path = HERE / "results" / f"cost-{about['date']}.json"
    before = json.loads(path.read_text())["cost"] if save and path.exists() else {}
    result = {"machine": about, "cost": before | engine_cost.report(folder, panels)}
    caption = f"{about['cpu']}, {about['threads']} threads, {about['clock']} time, bf16, 256M shapes, {about['date']}"
    engine_cost.draw(result["cost"], target, caption)
    _finish(result, path if save else None)


def memory(folder: Path, about: dict[str, Any], kinds: Sequence[str], save: bool) -> None:
    """Peak memory with a full cache of keys and values; one JSON object on the last line."""
    path = HERE / "results" / f"memory-{about['date']}.json"
    found = json.loads(path.read_text())["memory"] if save and path.exists() else {}
    for kind in kinds:
        worker = Worker(f"memory_{kind}", folder, about["threads"])
        found[kind] = worker.ask("fill")
        worker.close()
        print(f"{kind}: {found[kind]['share_of_bound']:.3f} of the bound", file=sys.stderr, flush=True)
    _finish({"machine": about, "memory": found}, path if save else None)


def _finish(result: dict[str, Any], path: Path | None) -> None:
    """Write the result where it is to be kept, and as the last line of output."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=sorted({kind.split("_")[0] for kind in PEERS}), default=[])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, transformers as the only peer")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be given repeatedly")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with one thread, for busy machines")
    parser.add_argument("--cost-plot", type=Path, help="draw seconds by tiles, frames and tokens, and do nothing else")
    parser.add_argument("--cost-panel", action="append", choices=PANELS, help="only this part of the drawing")
    parser.add_argument("--memory", action="append", choices=KINDS, help="peak memory with a full cache, only")
    parser.add_argument("--save", action="store_true", help="write the result into benchmarks/results/ as well")
    asked = parser.parse_args()
    from smolvlm_fms.engine.machine import cpu_count

    threads = asked.threads or cpu_count()
    if asked.cpu_time:
        os.environ["BENCHMARK_CLOCK"] = "cpu"
    about = machine(threads) | {"clock": "cpu" if asked.cpu_time else "wall"}
    folder = engine_checkpoint.build()
    if asked.cost_plot:
        return cost_plot(folder, asked.cost_plot, about, asked.cost_panel or PANELS, asked.save)
    if asked.memory:
        return memory(folder, about, asked.memory, asked.save)
    peers = ["transformers"] if asked.quick or not asked.peer else asked.peer
    workers = start_workers(folder, threads, peers, asked.quick)
    try:
        versions = {kind: worker.ask("about") for kind, worker in workers.items()}
        settle_s = 0.0 if asked.quick else SETTLE_S  # transformers' threads do not spin
        bench = Bench(workers, asked.repeats or (3 if asked.quick else 9), settle_s)
        ceiling = max(workers["bf16"].ask("gemm") for _ in range(2 if asked.quick else 4))
        measure(bench, asked.quick, asked.part or PARTS)
        ceiling = max(ceiling, workers["bf16"].ask("gemm"))
        peaks = {kind: worker.ask("peak") for kind, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    cold = []
    if "cold" in (asked.part or PARTS):
        cold = cold_starts(folder, threads, 1 if asked.quick else 5)
    own = [kind for kind in workers if kind not in PEERS]
    result = {
        "machine": about | {"bf16_gemm_gflops": ceiling, "load_after": os.getloadavg()[0]},
        "versions": versions,
        "ours": {kind: bench.report(kind) | {"peak_bytes": peaks[kind]} for kind in own},
        "peers": {kind: bench.report(kind) | {"peak_bytes": peaks[kind]} for kind in workers if kind in PEERS},
        "ratios": ratios(bench, ceiling, folder),
        "cold_start_s": statistics.median(cold) if cold else None,
    }
    _finish(result, HERE / "results" / f"engine-{about['date']}.json" if asked.save else None)


if __name__ == "__main__":
    main()
