"""The benchmark's workers for runtimes that only have a tower: OpenVINO in bf16, ONNX Runtime in dynamic int8.

python benchmarks/peers/towers.py openvino|ort CHECKPOINT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine_peers import TOWERS, overlay
from engine_workers import serve, timed

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def pixels() -> Any:
    """One tile, (1, 3, 512, 512) fp32 in −1…1."""
    return (np.random.default_rng(0).random((1, 3, 512, 512)) * 2 - 1).astype(np.float32)


class OpenVINO:
    """The tower in bf16, tuned for latency; of the two conversions the one that is quicker here."""

    def __init__(self) -> None:
        overlay("openvino")
        import openvino

        self.version = openvino.__version__
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(THREADS),
        }
        tile, core, self.tried = pixels(), openvino.Core(), {}
        best = float("inf")
        for name in ("tower.xml", "tower-onnx.xml"):
            if (TOWERS / name).exists():
                request = core.compile_model(TOWERS / name, "CPU", settings).create_infer_request()
                request.set_input_tensor(openvino.Tensor(tile))
                request.infer()
                self.tried[name] = min(timed(request.infer) for _ in range(2))
                if self.tried[name] < best:
                    best, self.request = self.tried[name], request

    def about(self) -> dict[str, Any]:
        return {"openvino": self.version, "precision": "bf16", "threads": THREADS, "tried": self.tried}

    def tower(self) -> float:
        return timed(self.request.infer)


class OnnxRuntime:
    """The tower in dynamic int8 (weights by channel, activations by tensor), every graph optimisation on."""

    def __init__(self) -> None:
        overlay("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.version = onnxruntime.__version__
        path = TOWERS / "tower-int8.onnx"
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {self.session.get_inputs()[0].name: pixels()}

    def about(self) -> dict[str, Any]:
        return {"onnxruntime": self.version, "precision": "dynamic int8", "threads": THREADS}

    def tower(self) -> float:
        return timed(lambda: self.session.run(None, self.inputs))


if __name__ == "__main__":
    serve({"openvino": OpenVINO, "ort": OnnxRuntime}[sys.argv[1]])
