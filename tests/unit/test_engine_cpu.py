"""The packed CPU path beside the model in fp32: on our kernels and without them, in bf16, int8 and int4."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smolvlm_fms as sv
from smolvlm_fms.engine import cpu_runner, kernels
from smolvlm_fms.engine.config import EngineConfig
from smolvlm_fms.engine.cpu_runner import CpuRunner, FallbackRunner, pack_model, suits
from smolvlm_fms.engine.engine import Engine
from smolvlm_fms.engine.linears import OneDnnLinear
from smolvlm_fms.engine.runner import ModelRunner
from smolvlm_fms.engine.torch_text import chunked_causal_attention
from smolvlm_fms.engine.tower import full_attention
from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from tests.parity.test_engine_parity import LENGTH, submit_row
from tests.tiny_models import FAMILIES, build_checkpoint, make_batch

TILES = [2, 0, 1, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: build_checkpoint(root / family, family, seed=3) for family in FAMILIES}


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the packed path; the kernels are part of a normal installation, and their absence is simulated."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("the kernels were not built here")
    return str(request.param)


def packed_model(folder: Path, **how: Any) -> Any:
    model = load_model(folder, dtype=torch.bfloat16)
    assert suits(model)
    pack_model(model, **how)
    return model


def engine_for(model: Any, **config: Any) -> Engine:
    runner = CpuRunner if kernels.available() else FallbackRunner
    return Engine(
        runner(model, 2048),
        decode=lambda ids: "",
        stop_tokens=[],
        context_length=512,
        config=EngineConfig(**config),
    )


def answers(engine: Engine, batch: Any, rows: list[int], **options: Any) -> list[list[Any]]:
    generations = [submit_row(engine, batch, row, **options) for row in rows]
    return [[one for event in generation for one in event.tokens] for generation in generations]


def worst_logprob_error(folder: Path, engine: Engine) -> float:
    """Largest difference between the engine's log-probabilities of its own tokens and the fp32 model's of the same."""
    exact = load_model(folder, dtype=torch.float32)
    batch = make_batch(folder, TILES, seed=1)
    worst = 0.0
    for row, sampled in enumerate(answers(engine, batch, list(range(len(TILES))), logprobs=0)):
        kept = batch["attention_mask"][row].bool()
        ids = torch.cat([batch["input_ids"][row][kept], torch.tensor([one.token for one in sampled])])[None]
        with torch.no_grad():
            logits = exact(ids, batch["pixel_values"][row][None], batch["pixel_attention_mask"][row][None])
        logprobs = logits[0, -LENGTH - 1 : -1].log_softmax(-1)
        for step, one in enumerate(sampled):
            worst = max(worst, abs(one.logprob - float(logprobs[step, one.token])))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_follows_fp32(family: str, path: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    engine = engine_for(packed_model(folder), prefill_chunk=13, prefill_chunk_alone=17)
    # Logits are of order one and have 8 bits; transformers' own bf16 differs as much.
    assert worst_logprob_error(folder, engine) < 0.2


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.25), ("int4", 1.5)])
def test_quantised_text_follows_fp32(quantize: str, bound: float, path: str, folders: dict[str, Path]) -> None:
    folder = folders["tied"]
    assert worst_logprob_error(folder, engine_for(packed_model(folder, quantize=quantize))) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_the_packed_tower_sees_what_the_model_sees(family: str, path: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    exact, plain, packed = load_model(folder), load_model(folder, dtype=torch.bfloat16), packed_model(folder)
    batch = make_batch(folder, [2, 1], seed=5)
    pixels, mask = batch["pixel_values"], batch["pixel_attention_mask"]
    with torch.inference_mode():
        wanted = exact.encode_images(pixels, mask).features
        usual = (plain.encode_images(pixels, mask).features - wanted).abs().max()
        runner = engine_for(packed).backend
        through_model = (packed.encode_images(pixels, mask).features - wanted).abs().max()
        from smolvlm_fms.model.packing import patch_mask

        patches = patch_mask(mask[0], packed.config.vision.patch_size)
        through_tower = (runner.tower(pixels[0], patches) - wanted[:2]).abs().max()  # type: ignore[attr-defined]
    assert through_model < 2 * usual
    assert through_tower < 2 * usual


def test_an_int8_tower_is_close(folders: dict[str, Path]) -> None:
    folder = folders["smolvlm"]
    pixels = torch.rand(1, 1, 3, 32, 32) * 2 - 1
    exact, packed = load_model(folder), packed_model(folder, quantize_tower="int8")
    with torch.inference_mode():
        wanted = exact.encode_images(pixels).features
        error = (packed.encode_images(pixels).features - wanted).norm() / wanted.norm()
    assert 1e-4 < error < 0.08


def test_rows_do_not_depend_on_their_neighbours(path: str, folders: dict[str, Path]) -> None:
    folder = folders["smolvlm"]
    batch = make_batch(folder, TILES, seed=1)
    model = packed_model(folder)
    alone = [answers(engine_for(model), batch, [row], logprobs=2)[0] for row in range(len(TILES))]
    together = answers(engine_for(model), batch, list(range(len(TILES))), logprobs=2)
    if path == "kernels":
        assert together == alone, "bit for bit"
    else:
        first = [[one.token for one in row][:4] for row in alone]
        assert [[one.token for one in row][:4] for row in together] == first


def test_a_packed_model_holds_its_weights_once(folders: dict[str, Path]) -> None:
    model = packed_model(folders["tied"])
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and "position" not in name]
    assert names == [], "matrices that are still there unpacked"
    untied = packed_model(folders["smolvlm"])
    assert [n for n, p in untied.named_parameters() if p.dim() == 2 and "position" not in n] == [
        "text_model.base_model.embedding.weight"
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_packed_model_has_left_its_file(tmp_path: Path) -> None:
    """One tensor left in a mapping keeps all its pages resident: the weights a second time."""
    folder = tmp_path / "bf16"
    save_pretrained(load_model(build_checkpoint(tmp_path / "fp32", "smolvlm", seed=3)), folder, dtype=torch.bfloat16)
    model = load_model(folder, fused_weights=False)

    def mapped() -> bool:
        return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()

    assert mapped(), "nothing is read before it is needed"
    pack_model(model)
    gc.collect()
    assert not mapped()


def test_what_cannot_be_packed_is_said(folders: dict[str, Path]) -> None:
    assert not suits(load_model(folders["smolvlm"], dtype=torch.float32))
    model = load_model(folders["smolvlm"], dtype=torch.bfloat16)
    with pytest.raises(ConfigurationError, match="int3"):
        pack_model(model, quantize="int3")
    with pytest.raises(ConfigurationError, match="int4"):
        pack_model(model, quantize_tower="int4")
    assert isinstance(ModelRunner(model, 128), ModelRunner), "and nothing was changed"


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "swiglu"])
def test_the_torch_linear_agrees_with_the_kernels(kind: str, activation: str) -> None:
    if not kernels.available():
        pytest.skip("the kernels were not built here")
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 96, generator=generator).bfloat16() / 10 for n in (40, 24)]
    biases = [torch.randn(40, generator=generator).bfloat16(), None]
    x = torch.randn(5, 96, generator=generator).bfloat16()
    ours = kernels.PackedLinear(parts, biases, kind=kind, activation=activation)
    other = OneDnnLinear(parts, biases, kind=kind, activation=activation)
    residual = torch.randn(5, ours.out_features, generator=generator).bfloat16()
    for arguments in ({}, {"residual": residual}, {"residual": residual, "scale": 0.5}, {"scale": 2.0}):
        assert torch.allclose(ours(x, **arguments).float(), other(x, **arguments).float(), rtol=0.02, atol=0.06)
    assert other(x, fp32_out=True).dtype == torch.float32
    if activation != "swiglu":
        ids = torch.tensor([[3, 0], [63, 41]])
        assert torch.allclose(ours.rows(ids).float(), other.rows(ids).float(), atol=1e-2)


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "quick_gelu", "swiglu"])
def test_without_onednn_the_linear_still_answers(monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    from smolvlm_fms.engine import linears

    x, weight, bias = torch.randn(3, 16).bfloat16(), torch.randn(10, 16).bfloat16(), torch.randn(10).bfloat16()
    with_onednn = OneDnnLinear(weight, bias, activation=activation)(x)
    monkeypatch.setattr(linears, "_onednn_works", lambda: False)
    without = OneDnnLinear(weight, bias, activation=activation)
    assert torch.allclose(without(x).float(), with_onednn.float(), rtol=0.02, atol=0.06)
    assert torch.equal(without.rows(torch.tensor([2])), weight[2:3])


def exact_attention(query_THD: Tensor, keys_SHD: Tensor, values_SHD: Tensor, scale: float, seen_TS: Tensor) -> Tensor:
    """Softmax attention in fp64, (T, H * D)."""
    query, keys, values = (part.double().transpose(0, 1) for part in (query_THD, keys_SHD, values_SHD))
    scores = (query @ keys.transpose(1, 2) * scale).masked_fill(~seen_TS, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("tokens", "heads", "width"), [(70, 1, 64), (33, 2, 24), (65, 5, 72)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_towers_on_torch_alone(
    monkeypatch: pytest.MonkeyPatch, tokens: int, heads: int, width: int, masked: bool
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, 3, heads, width, generator=generator).bfloat16()
    mask = torch.arange(tokens) % 3 != 1 if masked else None
    seen = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    exact = exact_attention(*qkv.unbind(1), width**-0.5, seen[None].expand(tokens, tokens))
    for _ in range(2):  # the second call finds the first one's memory
        assert torch.allclose(full_attention(qkv, mask, width**-0.5).double(), exact, atol=0.03)


@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 300), (95, 1), (96, 64), (97, 0), (250, 129)])
@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (4, 4, 24)])
def test_causal_attention_on_torch_alone(length: int, past: int, heads: int, groups: int, width: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(length, heads, width, generator=generator).bfloat16()
    keys, values = torch.randn(2, past + length, groups, width, generator=generator).bfloat16()
    seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    wide = [part.repeat_interleave(heads // groups, 1) for part in (keys, values)]
    exact = exact_attention(query, *wide, width**-0.5, seen)
    assert torch.allclose(
        chunked_causal_attention(query, keys, values, width**-0.5).double(), exact, rtol=0.02, atol=0.03
    )


def test_kinds_are_known() -> None:
    assert cpu_runner.QUANTIZED["int4"] == ("int4", "int8"), "the head decides between words: it keeps eight bits"


def test_company_and_caches_change_no_bit_of_an_answer() -> None:
    """The bundled model in bf16: questions alone, in a batch, in another order, and after each other on what the ones
    before left in the caches. Prompts are then cut into other chunks, and rows decoded in other batches."""
    if not kernels.available():
        pytest.skip("the kernels were not built here")
    vlm = sv.load("demo", dtype="bfloat16", engine=EngineConfig(prefill_chunk=37, max_sequences=5))
    pictures = [sv.bundled("pictures") / name for name in ("flag.png", "emoji-1.png", "pair.png")]
    questions = ["What is this?", "What is in the picture?", "How many are there? Count them one by one."]
    requests: list[Any] = [(picture, question) for picture in pictures for question in questions]
    requests += [(None, "Hello"), (pictures, "Compare them.")]

    def forget() -> None:
        vlm.engine.images.clear()
        vlm.engine.space.clear_prefixes()

    def ask(several: list[Any], first: bool = False) -> list[Any]:
        if first:
            forget()
        answers = vlm.batch(several, max_tokens=10, ignore_eos=True, logprobs=1)
        return [answer.logprobs for answer in answers]

    alone = [ask([request], first=True)[0] for request in requests]
    assert ask(requests, first=True) == alone
    assert ask(requests[::-1], first=True)[::-1] == alone
    kept = [ask([request])[0] for request in requests]
    assert kept == alone
    assert vlm.ask(*requests[1], max_tokens=1).usage.cached_tokens > 16
