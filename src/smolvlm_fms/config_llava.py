"""LLaVA-Next's configuration (granite-vision, LLaVA-1.6) and its any-resolution geometry.

The geometry stands here, among the leaves, because two rooms need the very same numbers: processing, which writes the
placeholders, and the model, which cuts the padding off the features. Integers in, integers out; no torch, no PIL.

    picture (h, w) ─▶ best pinpoint (H, W) ─▶ grid of H/tile × W/tile tiles, and the overview in front
                                           ─▶ patches of the grid, less those that only padding fills
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from smolvlm_fms.config import BaseConfig, TextConfig, VisionConfig, read_json_config
from smolvlm_fms.errors import ConfigurationError, InputError

__all__ = ["LLAVA_PRESETS", "AnyResolution", "LlavaNextConfig", "LlavaVisionConfig"]

Size = tuple[int, int]
"""(height, width)."""

# Where transformers' classes differ from one another; absent fields of a checkpoint have these values.
_TOWER_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}

_PINPOINTS_336: list[list[int]] = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class AnyResolution:
    """How a picture of any size is cut into tiles: possible canvases, side of a tile, patches along that side.

    pinpoints: canvases (height, width) in pixels, whole numbers of tiles; tile: pixels; patches: per side of a tile.
    """

    pinpoints: tuple[Size, ...]
    tile: int
    patches: int

    def __post_init__(self) -> None:
        if not self.pinpoints:
            raise ConfigurationError(
                "image_grid_pinpoints is empty; it lists the (height, width) of possible canvases."
            )
        for height, width in self.pinpoints:
            if height < self.tile or width < self.tile or height % self.tile or width % self.tile:
                raise ConfigurationError(
                    f"image_grid_pinpoints holds {[height, width]}, which is not a whole number of tiles of "
                    f"{self.tile} × {self.tile} pixels."
                )

    def canvas(self, size: Size) -> Size:
        """The pinpoint that keeps most of the picture's pixels and, among equals, wastes least; the first one wins.

        Scaled sides are cut to whole pixels in floating point, as the checkpoints' processors did in training.
        """
        height, width = _checked(size)
        best, kept, wasted = self.pinpoints[0], -1, 0
        for canvas in self.pinpoints:
            scale = min(canvas[1] / width, canvas[0] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            waste = canvas[0] * canvas[1] - effective
            if effective > kept or (effective == kept and waste < wasted):
                best, kept, wasted = canvas, effective, waste
        return best

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tiles, without the overview."""
        height, width = self.canvas(size)
        return height // self.tile, width // self.tile

    def num_tiles(self, size: Size) -> int:
        """Tiles of a picture, the overview among them."""
        rows, cols = self.grid(size)
        return 1 + rows * cols

    def fitted(self, size: Size) -> Size:
        """Height and width that the picture is resized to before it is padded to its canvas."""
        (height, width), (canvas_height, canvas_width) = _checked(size), self.canvas(size)
        across, down = canvas_width / width, canvas_height / height
        if across < down:
            return min(_ceil(height * across), canvas_height), canvas_width
        return canvas_height, min(_ceil(width * down), canvas_width)

    def padding(self, size: Size) -> Size:
        """Patches to cut at the top and at the bottom, and at the left and at the right, of the grid's features.

        One of the two is 0. The scaled side is rounded to 7 digits before it is cut to a whole number: without that,
        floating point loses a patch for some sizes, and released checkpoints were trained with the rounding.
        """
        height, width = _checked(size)
        rows, cols = (side * self.patches for side in self.grid(size))
        if width / height > cols / rows:
            return (rows - int(round(height * (cols / width), 7))) // 2, 0
        return 0, (cols - int(round(width * (rows / height), 7))) // 2

    def unpadded(self, size: Size) -> Size:
        """Rows and columns of the grid's patches that are left after unpadding."""
        rows, cols = (side * self.patches for side in self.grid(size))
        top, left = self.padding(size)
        return rows - 2 * top, cols - 2 * left

    def num_tokens(self, size: Size) -> int:
        """Image tokens of a picture: the overview, then the unpadded grid with a newline token after each row."""
        rows, cols = self.unpadded(size)
        return self.patches**2 + rows * (cols + 1)


@dataclass
class LlavaVisionConfig(VisionConfig):
    """A SigLIP or CLIP tower. Defaults are those that transformers' ``LlavaNextConfig`` gives its tower (CLIP-L/14)."""

    model_type: str = "clip_vision_model"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.model_type not in _TOWER_DEFAULTS:
            raise ConfigurationError(
                f"vision_config.model_type {self.model_type!r} is not supported; {' and '.join(_TOWER_DEFAULTS)} are."
            )
        super().__post_init__()

    @property
    def has_class_token(self) -> bool:
        """Whether a class token stands in front of the patches (CLIP) or not (SigLIP)."""
        return self.model_type == "clip_vision_model"

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a ``vision_config``; an empty one means the defaults, a missing ``model_type`` means CLIP."""
        if not values:
            return cls()
        defaults = _TOWER_DEFAULTS.get(str(values.get("model_type", "clip_vision_model")), {})
        return super().from_hf({**defaults, **values})

    def to_hf(self, model_type: str | None = None) -> dict[str, Any]:
        """Return the ``vision_config`` of a ``config.json``, by default with this tower's own ``model_type``."""
        values = {**self.as_dict(), "model_type": model_type or self.model_type}
        # SigLIP's pooling head takes no part in LLaVA-Next; its weights are neither kept nor written.
        return values if self.has_class_token else {**values, "vision_use_head": False}


@dataclass
class LlavaNextConfig(BaseConfig):
    """Tower, projector and text backbone of LLaVA-Next. Defaults are those of transformers' ``LlavaNextConfig``.

    vision_feature_layer: which hidden states of the tower are tapped, counted as transformers counts (0: embeddings,
    L or −1: the last block's output, before the post-norm); several are concatenated, in the given order.
    vision_feature_select_strategy: ``default`` drops the class token (CLIP), ``full`` keeps all tokens (SigLIP).
    scale_logits: divide the logits by the text's ``logits_scaling``, as Granite was trained and as its text model does
    everywhere. transformers' LLaVA-Next has left that out since it puts a head of its own on the bare backbone (from
    4.52); False gives its logits. The order of the tokens, and so greedy decoding, is the same either way.
    """

    vision: LlavaVisionConfig = field(default_factory=LlavaVisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model_type: str = "llava_next"
    image_token_id: int = 32000
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_select_strategy: str = "default"
    vision_feature_layer: int | list[int] = -2
    image_grid_pinpoints: list[list[int]] = field(default_factory=lambda: [list(p) for p in _PINPOINTS_336])
    image_seq_length: int = 576
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    scale_logits: bool = True
    dtype: str | None = None
    fused_weights: bool = True
    linear_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # FMS builds configurations from ``as_dict()``.
        if isinstance(self.vision, Mapping):
            self.vision = LlavaVisionConfig.from_dict(self.vision)
        if isinstance(self.text, Mapping):
            self.text = TextConfig.from_dict(self.text)
        if self.model_type != "llava_next":
            raise ConfigurationError(f"model_type {self.model_type!r} is not llava_next.")
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigurationError(
                f"image_token_index {self.image_token_id} lies outside text_config.vocab_size {self.text.vocab_size}."
            )
        wanted = "default" if self.vision.has_class_token else "full"
        if self.vision_feature_select_strategy != wanted:
            raise ConfigurationError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}, but a "
                f"{self.vision.model_type} needs {wanted!r}: 'default' drops the class token in front of the patches, "
                "which CLIP has and SigLIP has not; anything else leaves a number of features that makes no grid."
            )
        layers = self.vision.num_hidden_layers
        for layer in self.feature_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
                raise ConfigurationError(
                    f"vision_feature_layer {self.vision_feature_layer!r} does not fit the tower's {layers} layers; "
                    f"each must be a whole number from {-layers - 1} to {layers}."
                )
        if not self.feature_layers:
            raise ConfigurationError("vision_feature_layer is an empty list; name at least one layer.")
        self.resolution  # noqa: B018 - the geometry checks the pinpoints

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The tapped layers, as written."""
        layers = self.vision_feature_layer
        return tuple(layers) if isinstance(layers, list | tuple) else (layers,)

    @property
    def resolution(self) -> AnyResolution:
        """The geometry of this model's pictures."""
        return AnyResolution(_sizes(self.image_grid_pinpoints), self.vision.image_size, self.vision.patches_per_side)

    @property
    def tokens_per_tile(self) -> int:
        """Patch features of one tile."""
        return self.vision.patches_per_side**2

    @property
    def src_vocab_size(self) -> int:
        """Vocabulary size, under the name that FMS's tools read."""
        return self.text.vocab_size

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> Self:
        """Read a ``config.json`` (its path, its folder, or the parsed object); raises ConfigurationError."""
        values = read_json_config(source)
        if values.get("model_type") != "llava_next":
            raise ConfigurationError(f"model_type {values.get('model_type')!r} is not llava_next; another model.")
        if values.get("use_image_newline_parameter") is False:
            raise ConfigurationError("use_image_newline_parameter is false; this model always has an image newline.")
        text = dict(values.get("text_config") or {})
        names = (
            "projector_hidden_act",
            "multimodal_projector_bias",
            "vision_feature_select_strategy",
            "vision_feature_layer",
            "image_grid_pinpoints",
            "image_seq_length",
            "pad_token_id",
        )
        picked = {name: values[name] for name in names if values.get(name) is not None}
        token = values.get("image_token_index", values.get("image_token_id"))
        if token is not None:
            picked["image_token_id"] = token
        return cls(
            vision=LlavaVisionConfig.from_hf(values.get("vision_config") or {}),
            text=TextConfig.from_hf({"model_type": "llama", **text}),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            dtype=values.get("dtype") or values.get("torch_dtype"),
            **picked,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` of a Hugging Face checkpoint (transformers 4.57 and 5)."""
        values: dict[str, Any] = {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": self.model_type,
            "image_token_index": self.image_token_id,
            "projector_hidden_act": self.projector_hidden_act,
            "multimodal_projector_bias": self.multimodal_projector_bias,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "vision_feature_layer": self.vision_feature_layer,
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in self.image_grid_pinpoints],
            "image_seq_length": self.image_seq_length,
            "use_image_newline_parameter": True,
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": {**self.text.to_hf(), "tie_word_embeddings": self.tie_word_embeddings},
            "vision_config": self.vision.to_hf(),
        }
        if self.pad_token_id is not None:
            values["pad_token_id"] = self.pad_token_id
        if self.dtype is not None:
            values["dtype"] = values["torch_dtype"] = self.dtype
        return values


def _sizes(pinpoints: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    try:
        return tuple((int(height), int(width)) for height, width in pinpoints)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"image_grid_pinpoints must be a list of (height, width) pairs; {pinpoints!r} came."
        ) from None


def _checked(size: Size) -> Size:
    height, width = size
    if height < 1 or width < 1:
        raise InputError(f"A picture's size must be (height, width), both at least 1; {(height, width)} came.")
    return height, width


def _ceil(value: float) -> int:
    return -int(-value // 1)


def _presets() -> dict[str, LlavaNextConfig]:
    """Released variants. A checkpoint's own file overrides these."""

    def llava(vocab: int, image_token: int, **text: Any) -> LlavaNextConfig:
        backbone = TextConfig(vocab_size=vocab, rms_norm_eps=1e-5, **text)
        return LlavaNextConfig(text=backbone, image_token_id=image_token)

    def granite_vision() -> LlavaNextConfig:
        text = TextConfig(
            model_type="granite",
            vocab_size=49156,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=300000.0,
            embedding_multiplier=12.0,
            logits_scaling=8.0,
            residual_multiplier=0.22,
            attention_multiplier=0.015625,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        vision = LlavaVisionConfig.from_hf(
            {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            }
        )
        # Canvases of at most ten tiles, the longer grids as one row or one column or two of each.
        columns = {1: 10, 2: 5, 3: 3, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1}
        return LlavaNextConfig(
            vision,
            text,
            image_token_id=49155,
            vision_feature_select_strategy="full",
            vision_feature_layer=[-24, -20, -12, -1],
            image_grid_pinpoints=[[384 * r, 384 * c] for r, last in columns.items() for c in range(1, last + 1)],
            tie_word_embeddings=True,
        )

    big = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    yi = {"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "num_attention_heads": 56}
    return {
        "granite_vision_3_2_2b": granite_vision(),
        "granite_vision_3_3_2b": granite_vision(),
        "llava_v1_6_mistral_7b": llava(
            32064,
            32000,
            model_type="mistral",
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
        ),
        "llava_v1_6_vicuna_7b": llava(32064, 32000, max_position_embeddings=4096),
        "llava_v1_6_vicuna_13b": llava(32064, 32000, max_position_embeddings=4096, **big),
        "llava_v1_6_34b": llava(
            64064, 64000, num_key_value_heads=8, max_position_embeddings=4096, rope_theta=5000000.0, **yi
        ),
        "llama3_llava_next_8b": llava(
            128320,
            128256,
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rope_theta=500000.0,
        ),
    }


LLAVA_PRESETS: dict[str, LlavaNextConfig] = _presets()
"""Released variants by name (``fms.models.get_model("smolvlm_llava_next", name)``)."""
