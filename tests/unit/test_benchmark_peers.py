"""The benchmark's peers: what is read from their tools, what is left out and how, and how runs become one result."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ISSUE_RATIOS = {
    "tower_bf16_vs_transformers",
    "tower_bf16_vs_llamacpp",
    "tower_bf16_vs_openvino",
    "tower_int8_vs_llamacpp",
    "tower_int8_vs_ort",
    "tower_bf16_share_of_ceiling",
    "prefill_bf16_vs_transformers",
    "prefill_bf16_vs_llamacpp",
    *(f"decode_{kind}_{size}_vs_llamacpp" for kind in ("bf16", "int8", "int4") for size in ("short", "long")),
    "decode_batch8_vs_llamacpp",
    "fallback_tower_vs_transformers",
    "fallback_prefill_vs_transformers",
    "ttft_17_tiles_vs_llamacpp",
    "ttft_17_tiles_vs_transformers",
    "ttft_cached_speedup",
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def bench_row(n_gen: int, depth: int, flash: int, ubatch: int, rate: float) -> dict[str, Any]:
    """The fields of a llama-bench row that say what it measured; real ones have forty."""
    prompt = 0 if n_gen else 1128
    setting = {"flash_attn": flash, "n_ubatch": ubatch, "n_threads": 2}
    return {
        "n_prompt": prompt,
        "n_gen": n_gen,
        "n_depth": depth,
        "avg_ts": rate / 2,
        "samples_ts": [rate / 4, rate],
    } | setting


def test_reads_llama_bench(load: Any) -> None:
    tune = load("tune_llamacpp")
    rows = [bench_row(0, 0, 0, 512, 300.0), bench_row(64, 0, 1, 512, 70.0), bench_row(64, 1128, 0, 512, 50.0)]
    trials = tune.read_bench(json.dumps(rows))
    assert [trial["what"] for trial in trials] == ["prefill", "decode_short", "decode_long"]
    assert trials[0] == {"what": "prefill", "flash": False, "ubatch": 512, "tokens_per_s": 300.0}
    assert trials[1]["flash"] is True


def test_reads_batched_bench_between_other_lines(load: Any) -> None:
    line = {"flash_attn": 1, "n_ubatch": 512, "pp": 32, "tg": 48, "pl": 8, "speed_pp": 93.9, "speed_tg": 411.5}
    text = f"\nmain: n_kv_max = 2048\n\n{json.dumps(line)}\nllama_perf: load time\n"
    found = load("tune_llamacpp").read_batched(text)
    assert found == [{"what": "decode_batch", "flash": True, "ubatch": 512, "tokens_per_s": 411.5}]


def test_the_quickest_setting_wins(load: Any) -> None:
    tune = load("tune_llamacpp")
    rates = {(0, 512): 310.0, (1, 512): 350.0, (0, 2048): 290.0, (1, 2048): 330.0}
    rows = [bench_row(0, 0, flash, ubatch, rate) for (flash, ubatch), rate in rates.items()]
    rows += [bench_row(64, 1128, 0, 512, 60.0), bench_row(64, 1128, 1, 512, 55.0)]
    best = tune.best_of(tune.read_bench(json.dumps(rows)))
    assert best == {"prefill": {"flash": True, "ubatch": 512}, "decode_long": {"flash": False, "ubatch": 512}}


def test_worker_command_carries_the_settings(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = load("llamacpp")
    monkeypatch.setattr(worker, "LLAMACPP", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert json.loads(worker.command("llamacpp_q8")[-1]) == {}
    assert "DEFAULT SETTINGS" in capsys.readouterr().err
    best = {"prefill": {"flash": False, "ubatch": 2048}}
    (tmp_path / "settings.json").write_text(json.dumps({"best": {"llamacpp_q8": best}, "tried": {}}))
    words = worker.command("llamacpp_q8")
    assert [Path(word).name for word in words[:4]] == ["llamacpp_worker", "text-q8_0.gguf", "vision-q8_0.gguf", "3"]
    assert json.loads(words[-1]) == best
    assert capsys.readouterr().err == ""


def test_a_peer_that_is_not_there_is_left_out_loudly(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, peers = load("engine"), load("engine_peers")
    started: list[str] = []
    monkeypatch.setattr(engine, "Worker", lambda kind, *rest, **env: started.append(kind))
    monkeypatch.setattr(peers, "LLAMACPP", tmp_path)
    monkeypatch.setattr(peers, "TOWERS", tmp_path)
    workers = engine.start_workers(tmp_path, 2, ["llamacpp", "openvino", "ort"], quick=False)
    assert list(workers) == started == ["bf16", "int8", "int4", "fallback"]
    told = capsys.readouterr().err
    for kind in [*peers.LLAMACPP_FILES, "openvino", "ort"]:
        assert f"*** THE PEER {kind} IS LEFT OUT" in told
    assert "build_llamacpp.py" in told
    for name in ("llamacpp_worker", "text-f16.gguf", "vision-f16.gguf"):
        (tmp_path / name).touch()
    assert peers.PEERS["llamacpp"].missing() == ""
    assert "text-q8_0.gguf" in peers.PEERS["llamacpp_q8"].missing()


def test_overlay_lies_behind_the_environment(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("engine_peers")
    monkeypatch.setattr(peers, "OVERLAYS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert peers.overlay("json")
    assert not peers.overlay("smolvlm_no_such_peer")
    (tmp_path / "smolvlm_some_peer").mkdir()
    (tmp_path / "smolvlm_some_peer" / "smolvlm_some_peer.py").write_text("")
    assert peers.overlay("smolvlm_some_peer")
    assert sys.path[-1] == str(tmp_path / "smolvlm_some_peer")


class FakeWorker:
    """Answers each measurement with a figure of its own."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, do: str, **how: Any) -> float:
        return self.seconds


def test_ratios_have_the_promised_names_and_directions(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, peers, collect = load("engine"), load("engine_peers"), load("collect")
    monkeypatch.setattr(engine.engine_checkpoint, "tower_flops", lambda folder: 9e10)
    workers = {kind: FakeWorker(1.0) for kind in ("bf16", "int8", "int4", "fallback")}
    workers |= {kind: FakeWorker(3.0) for kind in peers.PEERS}
    workers["llamacpp_q4"] = FakeWorker(2.0)
    bench = engine.Bench(workers, 2)
    engine.measure(bench, quick=False)
    found = engine.ratios(bench, ceiling=100.0, folder=Path())
    assert set(found) >= ISSUE_RATIOS
    assert set(collect.BARS) == ISSUE_RATIOS
    assert found["tower_bf16_share_of_ceiling"] == pytest.approx(0.9)
    assert found["ttft_cached_speedup"] == pytest.approx(1.0)
    # Against the best of llama.cpp's types where the bar says so.
    assert found["prefill_bf16_vs_llamacpp"] == pytest.approx(2.0)
    assert found["decode_int4_long_vs_llamacpp"] == pytest.approx(2.0)
    assert found["decode_int8_short_vs_llamacpp"] == pytest.approx(3.0)
    assert found["tower_bf16_vs_openvino"] == pytest.approx(3.0)
    for kind in ("openvino", "ort"):
        assert list(bench.samples[kind]) == ["tower_s"]


def test_only_the_parts_that_are_asked_for(load: Any) -> None:
    engine = load("engine")
    bench = engine.Bench({"bf16": FakeWorker(1.0), "llamacpp": FakeWorker(2.0)}, 1)
    engine.measure(bench, quick=True, parts=["prefill"])
    assert list(bench.samples["bf16"]) == list(bench.samples["llamacpp"]) == ["prefill_tokens_per_s"]


def test_collects_runs_and_judges_by_the_bars(load: Any, tmp_path: Path) -> None:
    collect = load("collect")
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    ratios = {"tower_bf16_vs_transformers": 2.1, "tower_bf16_share_of_ceiling": 0.95}
    first.write_text("a line of a library\n" + json.dumps({"ratios": ratios, "cold_start_s": 2.0}) + "\n")
    second.write_text(json.dumps({"ratios": {"decode_int4_long_vs_llamacpp": 2.4}, "cold_start_s": None}))
    result = collect.collect([collect.read_run(first), collect.read_run(second)])
    assert result["verdicts"] == {
        "tower_bf16_vs_transformers": "held",
        "tower_bf16_share_of_ceiling": "aim",
        "decode_int4_long_vs_llamacpp": "missed",
        "cold_start_s": "held",
    }
    assert "tower_int8_vs_ort" in result["not_measured"]
    text = collect.table(result)
    assert "| decode_int4_long_vs_llamacpp | 2.40 | 2.5 | 3.3 | missed |" in text
    assert "| cold_start_s | 2.00 | ≤ 2.5 | ≤ 1.5 | held |" in text
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        collect.read_run(tmp_path / "empty")


def test_unknown_peer_is_refused() -> None:
    script = BENCHMARKS / "peers" / "install.py"
    done = subprocess.run([sys.executable, str(script), "nosuch"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no such peer: nosuch" in done.stderr
