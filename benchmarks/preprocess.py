"""Pictures to tiles: ours against transformers' two image processors, in one run, pixels compared.

    PYTHONPATH=.peers/torchvision OMP_NUM_THREADS=2 python benchmarks/preprocess.py [--repeats 9] [--save]

Without torchvision on the path, transformers' tensor back end is left out and the last line says so. Contestants take
turns, so that a busy machine slows all of them; compare the ratios, and the processor time (all threads), which other
programs disturb less. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image

from smolvlm_fms.processing import SmolVLMImageProcessor, native

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import torchvision_ops  # makes torchvision importable before transformers' processors want it

RELEASED = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
CALL = {"return_tensors": "pt", "return_row_col_info": True}


def contestants() -> dict[str, Callable[..., Any]]:
    """Name to processor, ours and theirs, with the released checkpoints' sizes."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    found: dict[str, Callable[..., Any]] = {
        "ours pil": SmolVLMImageProcessor(**RELEASED),
        "ours torch": SmolVLMImageProcessor(**RELEASED, backend="torch"),
        "transformers pil": SmolVLMImageProcessorPil(**RELEASED),
    }
    if torchvision_ops.available():
        from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor as TensorProcessor

        found["transformers torch"] = TensorProcessor(**RELEASED)
    return found


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colour fields with fine grain, as large as asked."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def cases() -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Name to (images, options, how many times fewer repeats)."""
    photo = photograph(3000, 4000)
    shapes = [(240, 320), (320, 240), (200, 200), (256, 384)]
    small = [photograph(*shapes[i % 4], seed=i) for i in range(64)]
    one_tile = {"size": {"longest_edge": 512}}
    return {
        "photo 4000x3000, Pillow image": (photo, {}, 1),
        "photo 4000x3000, array": (np.asarray(photo).copy(), {}, 1),
        "64 small, one tile each": ([[image] for image in small], one_tile, 1),
        "64 small, five tiles each": ([[image] for image in small], {"size": {"longest_edge": 1024}}, 2),
        "4 small, 13 to 17 tiles each": ([[image] for image in small[:4]], {}, 2),
    }


def measure(
    images: Any, options: dict[str, Any], processors: dict[str, Callable[..., Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """Medians of time and processor time, and pixel differences in levels of 0…255, for each contestant."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in processors}
    pixels: dict[str, torch.Tensor] = {}
    for turn in range(repeats + 1):  # the first turn warms up and is compared
        for name, processor in processors.items():
            start = time.perf_counter(), time.process_time()
            batch = processor(images, **options, **CALL)
            taken = time.perf_counter() - start[0], time.process_time() - start[1]
            if turn:
                times[name].append(taken)
            else:
                pixels[name] = batch["pixel_values"][:4].clone()
            del batch
    result = {
        name: {
            "median_ms": round(statistics.median(wall for wall, _ in each) * 1000, 1),
            "least_ms": round(min(wall for wall, _ in each) * 1000, 1),
            "cpu_ms": round(statistics.median(cpu for _, cpu in each) * 1000, 1),
        }
        for name, each in times.items()
    }
    for kind in ("pil", "torch"):
        if f"transformers {kind}" in pixels:
            difference = (pixels[f"ours {kind}"] - pixels[f"transformers {kind}"]).abs().max().item()
            result[f"ours {kind}"]["max_levels_to_transformers"] = round(difference * 127.5, 3)
    peers = [value for name, value in result.items() if name.startswith("transformers")]
    for name in ("ours pil", "ours torch"):
        for key, label in (("median_ms", "times_their_better"), ("cpu_ms", "times_their_better_in_cpu")):
            result[name][label] = round(min(peer[key] for peer in peers) / result[name][key], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/preprocess-DATE.json")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    processors = contestants()
    report: dict[str, Any] = {
        "benchmark": "preprocess",
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "compiled_resize": native.can_resize(3, Image.Resampling.LANCZOS),
        "torchvision": torchvision_ops.available(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
        },
        "cases": {},
    }
    for name, (images, extra, fewer) in cases().items():
        if options.only not in name:
            continue
        result = measure(images, extra, processors, max(options.repeats // fewer, 2))
        report["cases"][name] = result
        print(name)
        for contestant, figures in result.items():
            print(f"    {contestant:20}", *(f"{key} {value}" for key, value in figures.items()))
    report["load_at_end"] = round(os.getloadavg()[0], 1)
    if options.save:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"preprocess-{report['date']}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
