"""What a loaded engine does to its process: threads, and processor time when nobody asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolvlm_fms.engine import kernels

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the process's threads")

CHILD = """
import json, os, sys, threading, time
import torch
import smolvlm_fms as sv

def tasks():
    return len(os.listdir("/proc/self/task"))

threads = int(sys.argv[1])
vlm = sv.load("demo", dtype="bfloat16", threads=threads)
picture = sv.bundled("pictures") / "flag.png"
vlm.ask(picture, "What is this?", max_tokens=4)
before = tasks()
chosen = []

def ask():
    for number in range(3):
        # torch's own operators and our kernels in turn: the tower is ours, torch multiplies between the questions
        # (in bf16: MKL, which multiplies fp32, brings its own default into every thread)
        vlm.ask(picture, f"What is this, number {number}?", max_tokens=4)
        torch.randn(300, 300).bfloat16() @ torch.randn(300, 300).bfloat16()
    chosen.append(torch.get_num_threads())

workers = [threading.Thread(target=ask) for _ in range(6)]
peak = 0
for worker in workers:
    worker.start()
while any(worker.is_alive() for worker in workers):
    peak = max(peak, tasks())
    time.sleep(0.002)
for worker in workers:
    worker.join()
time.sleep(0.1)  # OpenMP's threads look for work for a moment before they sleep
busy = time.process_time()
time.sleep(1.0)
idle = time.process_time() - busy
openmp = {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "libgomp" in line}
openmp |= {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "libiomp" in line}
print(json.dumps({"before": before, "peak": peak, "chosen": chosen, "idle": idle, "openmp": sorted(openmp)}))
"""


def run(threads: int) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(threads)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for_and_sleep_when_idle(threads: int) -> None:
    """Torch and our kernels share one OpenMP runtime, and with it one team a calling thread; a thread that asks does
    not bring its own default along; nobody spins when there is nothing to do."""
    found = run(threads)
    assert found["chosen"] == [threads] * 6
    # Beside the six that ask: their teams (each asking thread leads one), and a picture's own threads while it is cut.
    assert found["peak"] <= found["before"] + 6 * threads + threads, found
    if kernels.available():
        assert len(found["openmp"]) == 1, found["openmp"]
    assert found["idle"] < 0.05, f"{found['idle']} s of processor time in one second without a question"
