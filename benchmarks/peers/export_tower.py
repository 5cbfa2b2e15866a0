"""The benchmark's tower and connector as ONNX (fp32 and dynamically quantised int8) and as OpenVINO's own format.

    python benchmarks/peers/export_tower.py                         # into build/peers/towers; needs install.py first

One tile in, (1, 3, 512, 512) fp32; its image tokens out, (1, 64, 576). The graph is transformers' own module, exported
once to ONNX and, for OpenVINO, traced by its own converter as well, which keeps attention one operator.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import engine_checkpoint  # noqa: E402
from engine_peers import TOWERS, overlay  # noqa: E402


class Tower(nn.Module):
    """transformers' vision model and connector for one whole tile: pixels (1, 3, H, W) to image tokens (1, T, D).

    Its parts are called in turn: the model as a whole would put a mask of all patches into the graph, which costs the
    runtimes time and hides nothing.
    """

    def __init__(self, model: Any, attention: str) -> None:
        super().__init__()
        self.vision, self.connector = model.model.vision_model, model.model.connector
        self.vision.config._attn_implementation = attention
        config = model.config.vision_config
        self.positions = torch.arange((config.image_size // config.patch_size) ** 2)

    def forward(self, pixels: Tensor) -> Tensor:
        parts = self.vision.embeddings
        hidden = parts.patch_embedding(pixels).flatten(2).transpose(1, 2) + parts.position_embedding(self.positions)
        for layer in self.vision.encoder.layers:
            hidden = layer(hidden, None)
        tokens: Tensor = self.connector(self.vision.post_layernorm(hidden))
        return tokens


def export(model: Any, tile: Tensor) -> None:
    """Write tower.onnx and, where the packages are installed, tower-int8.onnx and OpenVINO's two versions.

    ONNX gets attention as two products and a softmax (the fused operator would be taken apart with guards against rows
    of -inf), OpenVINO's converter the fused operator, which it has as well.
    """
    TOWERS.mkdir(parents=True, exist_ok=True)
    plain = TOWERS / "tower.onnx"
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["tokens"]}
    torch.onnx.export(Tower(model, "eager").eval(), (tile,), plain, dynamo=True, external_data=False, **names)
    print("wrote", plain)
    if overlay("onnxruntime"):
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready = TOWERS / "tower-ready.onnx"
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_dynamic(ready, TOWERS / "tower-int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
        print("wrote", TOWERS / "tower-int8.onnx")
    if overlay("openvino"):
        import openvino

        openvino.save_model(openvino.convert_model(str(plain)), TOWERS / "tower-onnx.xml", compress_to_fp16=False)
        traced = openvino.convert_model(Tower(model, "sdpa").eval(), example_input=tile, input=[tuple(tile.shape)])
        openvino.save_model(traced, TOWERS / "tower.xml", compress_to_fp16=False)
        print("wrote", TOWERS / "tower.xml")


def check(expected: Tensor, tile: Tensor) -> None:
    """What each version's output differs by, relative to the largest value."""
    scale = expected.abs().max()
    for name in ("tower.onnx", "tower-int8.onnx"):
        if overlay("onnxruntime") and (TOWERS / name).exists():
            import onnxruntime

            session = onnxruntime.InferenceSession(TOWERS / name, providers=["CPUExecutionProvider"])
            found = session.run(None, {session.get_inputs()[0].name: tile.numpy()})[0]
            print(f"{name}: error {float(np.abs(found - expected.numpy()).max() / scale):.2e}")
    for name in ("tower.xml", "tower-onnx.xml"):
        if overlay("openvino") and (TOWERS / name).exists():
            import openvino

            compiled = openvino.Core().compile_model(TOWERS / name, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
            found = compiled(tile.numpy())[0]
            print(f"{name} in bf16: error {float(np.abs(found - expected.numpy()).max() / scale):.2e}")


def main() -> None:
    import transformers

    folder = engine_checkpoint.build()
    kind = transformers.SmolVLMForConditionalGeneration
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    side = model.config.vision_config.image_size
    tile = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = model.model.get_image_features(tile[None]).pooler_output[0][None]
        export(model, tile)
    check(expected, tile)


if __name__ == "__main__":
    main()
