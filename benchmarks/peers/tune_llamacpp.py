"""Find llama.cpp's best setting for each kind of work on this machine, with its own benchmarks.

    python benchmarks/peers/tune_llamacpp.py [--kind llamacpp_q4] [--threads 2]

``llama-bench`` measures prefill and decoding with flash attention off and on and with two sizes of the physical batch,
``llama-batched-bench`` eight sequences, and our worker (libmtmd has no benchmark of its own) the tower. The best ones
go into build/peers/llamacpp/settings.json, which the benchmark's workers read, together with all that was tried.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine_checkpoint
from engine_peers import LLAMACPP, LLAMACPP_FILES, PEERS

PROMPT = 1128
STEPS = 64
UBATCHES = (256, 512)
SETTINGS = LLAMACPP / "settings.json"


def read_bench(text: str) -> list[dict[str, Any]]:
    """What ``llama-bench -o json`` printed, as trials: what, flash, ubatch and tokens per second (the best repeat)."""
    trials = []
    for row in json.loads(text):
        if row["n_gen"] == 0:
            what = "prefill"
        else:
            what = "decode_long" if row["n_depth"] else "decode_short"
        flash = bool(row["flash_attn"])
        trials.append({"what": what, "flash": flash, "ubatch": row["n_ubatch"], "tokens_per_s": max(row["samples_ts"])})
    return trials


def read_batched(text: str) -> list[dict[str, Any]]:
    """The same for the JSON lines of ``llama-batched-bench``; other lines are passed over."""
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [
        {
            "what": "decode_batch",
            "flash": bool(row["flash_attn"]),
            "ubatch": row["n_ubatch"],
            "tokens_per_s": row["speed_tg"],
        }
        for row in rows
    ]


def best_of(trials: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind of work the setting with the highest rate."""
    best: dict[str, dict[str, Any]] = {}
    for trial in sorted(trials, key=lambda trial: trial["tokens_per_s"]):
        best[trial["what"]] = {"flash": trial["flash"], "ubatch": trial["ubatch"]}
    return best


def output_of(*command: str) -> str:
    print("+", *command, file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def text_trials(model: Path, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Prefill, decoding at both depths and in a batch of eight."""
    tools = LLAMACPP / "build" / "bin"
    common = ("-m", str(model), "-t", str(threads))
    bench = (str(tools / "llama-bench"), *common, "-r", str(repeats), "-o", "json", "-fa", "0,1")
    sizes = ",".join(map(str, UBATCHES))
    trials = read_bench(output_of(*bench, "-p", str(PROMPT), "-n", "0", "-ub", sizes))
    trials += read_bench(output_of(*bench, "-p", "0", "-n", str(STEPS), "-d", f"0,{PROMPT}"))
    batched = (str(tools / "llama-batched-bench"), *common, "-c", "2048", "-npp", "32", "-ntg", "48", "-npl", "8")
    for flash in ("on", "off"):
        trials += read_batched(output_of(*batched, "-fa", flash, "--output-format", "jsonl"))
    return trials


def tower_trials(kind: str, threads: int) -> list[dict[str, Any]]:
    """Tiles a second, written as ``tokens_per_s`` too, so that the rest is alike."""
    files = [str(LLAMACPP / name) for name in LLAMACPP_FILES[kind]]
    words = [str(LLAMACPP / "llamacpp_worker"), *files, str(threads), str(engine_checkpoint.PICTURE), "{}"]
    asks = [json.dumps({"do": "tower", "setting": {"flash": flash}}) for flash in (True, False) for _ in range(4)]
    done = subprocess.run(words, input="\n".join(asks) + "\n", stdout=subprocess.PIPE, text=True, check=True)
    seconds = [float(line) for line in done.stdout.splitlines()]
    return [
        {"what": "tower", "flash": flash, "ubatch": 512, "tokens_per_s": 1 / min(part)}
        for flash, part in ((True, seconds[1:4]), (False, seconds[5:]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=sorted(LLAMACPP_FILES), default=[])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    found = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {"best": {}, "tried": {}}
    for kind in asked.kind or LLAMACPP_FILES:
        trials = text_trials(LLAMACPP / LLAMACPP_FILES[kind][0], asked.threads, asked.repeats)
        if "tower" in PEERS[kind].does:
            trials += tower_trials(kind, asked.threads)
        found["tried"][kind], found["best"][kind] = trials, best_of(trials)
        SETTINGS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
