"""Model configurations: what a checkpoint's ``config.json`` says, checked and given one vocabulary.

``SmolVLMConfig.from_hf`` reads the files that Hugging Face checkpoints of ``model_type`` ``smolvlm`` and ``idefics3``
carry, in both vocabularies of names that have been released, and ``to_hf`` writes one back. Nothing here knows torch.

Where a field is absent, the value is the one that transformers' configuration class has as its default, because that
is what the checkpoint was trained with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from smolvlm_fms.errors import ConfigurationError

__all__ = ["BaseConfig", "SmolVLMConfig", "TextConfig", "VisionConfig"]

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu")
"""Activation names that both transformers and this package know; a configuration naming another one raises."""

ROPE_TYPES = ("default", "llama3")

TEXT_CLASSES = {"llama": "LlamaForCausalLM", "granite": "GraniteForCausalLM", "mistral": "MistralForCausalLM"}
"""What configurations call the text model's class; converters (llama.cpp's) choose by it."""

# Where transformers' configuration classes have other defaults than LlamaConfig.
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "granite": {"attention_multiplier": 1.0},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}


@dataclass
class BaseConfig:
    """The interface that FMS expects of a model configuration, strict where FMS is lenient: unknown names raise."""

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as nested plain dictionaries."""
        return dataclasses.asdict(self)

    def save(self, file_path: str | Path) -> None:
        """Write the configuration in this package's own vocabulary (``to_hf`` is for ``config.json``)."""
        Path(file_path).write_text(json.dumps(self.as_dict(), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, json_file: str | Path) -> Self:
        """Read what ``save`` wrote."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from nested dictionaries in this package's own vocabulary; unknown names raise ConfigurationError."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        _refuse_unknown(cls.__name__, values, known)
        arguments = dict(values)
        for name, f in known.items():
            sub = f.default_factory
            if name in arguments and isinstance(sub, type) and issubclass(sub, BaseConfig):
                if isinstance(arguments[name], Mapping):
                    arguments[name] = sub.from_dict(arguments[name])
        return cls(**arguments)

    def updated(self, **changes: Any) -> Self:
        """Return a changed deep copy. A nested configuration may be changed by a dictionary of its fields."""
        known = {f.name for f in dataclasses.fields(self)}
        _refuse_unknown(type(self).__name__, changes, known)
        merged = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in changes.items():
            old = merged[name]
            merged[name] = old.updated(**value) if isinstance(old, BaseConfig) and isinstance(value, Mapping) else value
        for name, value in merged.items():
            if isinstance(value, BaseConfig) and name not in changes:
                merged[name] = dataclasses.replace(value)
        return type(self)(**merged)


@dataclass
class VisionConfig(BaseConfig):
    """A SigLIP-shaped vision tower. Defaults are those of transformers' ``SmolVLMVisionConfig``."""

    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "vision_config", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        _positive(self, "vision_config", "num_channels", "image_size", "patch_size")
        _divides(self, "vision_config", "hidden_size", "num_attention_heads")
        _activation("vision_config.hidden_act", self.hidden_act)
        if self.patch_size > self.image_size:
            raise ConfigurationError(
                f"vision_config.patch_size {self.patch_size} is larger than image_size {self.image_size}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a full tile (a remainder of pixels is not covered: 384/14 gives 27)."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a ``vision_config``; fields without a use (``size``, ``max_image_size`` …) are passed over."""
        picked = _pick(cls, values)
        for name in ("image_size", "patch_size"):
            if isinstance(picked.get(name), list | tuple):
                picked[name] = _square(f"vision_config.{name}", picked[name])
        return cls(**picked)

    def to_hf(self, model_type: str) -> dict[str, Any]:
        """Return the ``vision_config`` of a ``config.json``."""
        return {"model_type": f"{model_type}_vision", **self.as_dict()}


@dataclass
class TextConfig(BaseConfig):
    """A Llama- or Granite-shaped text backbone. Defaults are those of transformers' ``LlamaConfig``.

    The four multipliers are Granite's (arXiv 2408.13359); at their defaults the backbone is a Llama.
    ``attention_multiplier`` None means head_dim ** -0.5.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        if self.model_type not in TEXT_CLASSES:
            raise ConfigurationError(
                f"text_config.model_type {self.model_type!r} is not supported; llama, granite and mistral are."
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        _positive(self, "text_config", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _positive(self, "text_config", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        _divides(self, "text_config", "num_attention_heads", "num_key_value_heads")
        _divides(self, "text_config", "hidden_size", "num_attention_heads")
        if self.head_dim * self.num_attention_heads != self.hidden_size and self.model_type != "granite":
            raise ConfigurationError(
                f"text_config.head_dim {self.head_dim} times {self.num_attention_heads} heads is not hidden_size "
                f"{self.hidden_size}; FMS's Llama blocks need that. Only a granite text_config may differ."
            )
        _activation("text_config.hidden_act", self.hidden_act)
        if self.rope_scaling is not None and self.rope_scaling.get("rope_type") not in ROPE_TYPES:
            raise ConfigurationError(
                f"text_config.rope_scaling {self.rope_scaling!r} is not supported; known: {', '.join(ROPE_TYPES)}."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a ``text_config`` in transformers 4's (``rope_theta``) or 5's (``rope_parameters``) vocabulary."""
        for name in ("use_resampler", "qk_layer_norms", "rope_interleaved"):
            if values.get(name):
                raise ConfigurationError(
                    f"text_config.{name} is {values[name]!r}; this model has no such part, so the checkpoint cannot "
                    "be computed as its authors meant."
                )
        values = {**_TEXT_DEFAULTS.get(str(values.get("model_type")), {}), **values}
        window = values.get("sliding_window")
        # A window that no position reaches beyond changes nothing.
        reached = values.get("model_type") != "mistral" or (window or 0) < (values.get("max_position_embeddings") or 0)
        if values.get("use_sliding_window") or (window and reached):
            raise ConfigurationError(
                f"text_config.sliding_window is {window}; sliding-window attention is not supported. Set it to null "
                "where the weights were trained with full attention."
            )
        picked = _pick(cls, values)
        theta, scaling = _rope(values, picked.pop("rope_scaling", None))
        if theta is not None:
            picked["rope_theta"] = theta
        if picked.get("max_position_embeddings") is None:
            picked.pop("max_position_embeddings", None)
        return cls(**picked, rope_scaling=scaling)

    def to_hf(self) -> dict[str, Any]:
        """Return a ``text_config`` that transformers 4.57 and 5 both read."""
        values = {"architectures": [TEXT_CLASSES[self.model_type]], **self.as_dict()}
        if self.model_type != "granite":
            for name in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"):
                del values[name]
        if self.model_type == "mistral":
            values["sliding_window"] = None  # left out, it would mean 4096
        scaling = self.rope_scaling or {"rope_type": "default"}
        # transformers 4 reads rope_theta and rope_scaling, 5 reads rope_parameters and ignores the former two.
        return {**values, "rope_parameters": {**scaling, "rope_theta": self.rope_theta}}

    @property
    def width(self) -> int:
        """Width of all query heads together."""
        assert self.head_dim is not None
        return self.num_attention_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied with before the softmax."""
        assert self.head_dim is not None
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier


@dataclass
class SmolVLMConfig(BaseConfig):
    """SmolVLM or Idefics3: tower, connector, text backbone. Defaults are those of transformers' ``SmolVLMConfig``."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model_type: str = "smolvlm"
    scale_factor: int = 2
    image_token_id: int = 128257
    pad_token_id: int | None = 128002
    tie_word_embeddings: bool = False
    dtype: str | None = None
    fused_weights: bool = True
    linear_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.vision, Mapping):  # FMS builds configurations from ``as_dict()``
            self.vision = VisionConfig.from_dict(self.vision)
        if isinstance(self.text, Mapping):
            self.text = TextConfig.from_dict(self.text)
        if self.model_type not in ("smolvlm", "idefics3"):
            raise ConfigurationError(f"model_type {self.model_type!r} is not smolvlm or idefics3.")
        _positive(self, "config", "scale_factor")
        side = self.vision.patches_per_side
        if side % self.scale_factor:
            raise ConfigurationError(
                f"scale_factor {self.scale_factor} does not divide the {side} patches along a tile's side "
                f"(image_size {self.vision.image_size} // patch_size {self.vision.patch_size})."
            )
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigurationError(
                f"image_token_id {self.image_token_id} lies outside text_config.vocab_size {self.text.vocab_size}."
            )

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes: (patches per side / scale_factor) squared."""
        return (self.vision.patches_per_side // self.scale_factor) ** 2

    @property
    def src_vocab_size(self) -> int:
        """Vocabulary size, under the name that FMS's tools read."""
        return self.text.vocab_size

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> Self:
        """Read a ``config.json`` (its path, its folder, or the parsed object).

        Raises ConfigurationError, naming the field, for values that contradict each other or that this model cannot
        honour. Fields it has no use for are passed over.
        """
        values = read_json_config(source)
        model_type = values.get("model_type")
        if model_type not in ("smolvlm", "idefics3"):
            raise ConfigurationError(f"model_type {model_type!r} is not smolvlm or idefics3; this is another model.")
        text = dict(values.get("text_config") or {"rms_norm_eps": 1e-5})
        if values.get("use_resampler"):
            raise ConfigurationError("use_resampler is true; SmolVLM has no perceiver resampler.")
        if "vocab_size" in values and "vocab_size" not in text:
            text["vocab_size"] = values["vocab_size"]
        picked = {
            name: values[name] for name in ("image_token_id", "pad_token_id") if isinstance(values.get(name), int)
        }
        scale = _one_of(
            ("scale_factor", values.get("scale_factor")),
            ("pixel_shuffle_factor", values.get("pixel_shuffle_factor")),
            ("text_config.pixel_shuffle_factor", text.get("pixel_shuffle_factor")),
        )
        if scale is not None:
            picked["scale_factor"] = scale
        # Published files differ in where they say it; the top decides, as in transformers. The loader
        # checks the decision against the tensors that the checkpoint really holds.
        tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        config = cls(
            vision=VisionConfig.from_hf(_vision_values(values)),
            text=TextConfig.from_hf(text),
            model_type=model_type,
            tie_word_embeddings=bool(tied),
            dtype=values.get("dtype") or values.get("torch_dtype"),
            **picked,
        )
        said = values.get("image_seq_len")
        if said is not None and said != config.tokens_per_tile:
            raise ConfigurationError(
                f"image_seq_len is {said}, but image_size {config.vision.image_size}, patch_size "
                f"{config.vision.patch_size} and scale_factor {config.scale_factor} give {config.tokens_per_tile}."
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` of a Hugging Face checkpoint (transformers 4.57 and 5)."""
        names = {"smolvlm": "SmolVLMForConditionalGeneration", "idefics3": "Idefics3ForConditionalGeneration"}
        renamed = {"architectures": ["VLlama3ForCausalLM"]} if self.text.model_type == "llama" else {}  # as released
        values: dict[str, Any] = {
            "architectures": [names[self.model_type]],
            "model_type": self.model_type,
            "image_token_id": self.image_token_id,
            "scale_factor": self.scale_factor,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.text.vocab_size,
            "text_config": {**self.text.to_hf(), **renamed, "tie_word_embeddings": self.tie_word_embeddings},
            "vision_config": self.vision.to_hf(self.model_type),
        }
        if self.pad_token_id is not None:
            values["pad_token_id"] = self.pad_token_id
        if self.dtype is not None:
            values["dtype"] = values["torch_dtype"] = self.dtype
        return values


def read_json_config(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Return the parsed ``config.json``, given itself, its path or its folder; raises ConfigurationError."""
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"There is no {path}; a checkpoint folder holds a config.json.") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def _vision_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Vision fields, nested or (as in early conversions) flat at the top with a ``vision_`` prefix."""
    nested = values.get("vision_config")
    if nested is not None:
        return dict(nested)
    names = {f.name for f in dataclasses.fields(VisionConfig)}
    flat = {n: values[f"vision_{n}"] for n in names if f"vision_{n}" in values}
    if "vision_hidden" in values:
        flat["hidden_size"] = values["vision_hidden"]
    return flat | {n: values[n] for n in ("image_size", "patch_size", "num_channels") if n in values}


def _rope(values: Mapping[str, Any], scaling: Any) -> tuple[float | None, dict[str, Any] | None]:
    """RoPE base and scaling from transformers 4's two fields or 5's one; contradictions raise."""
    parameters = values.get("rope_parameters") or {}
    theta = _one_of(
        ("text_config.rope_theta", values.get("rope_theta")), ("rope_parameters", parameters.get("rope_theta"))
    )
    merged = {**(scaling or {}), **{k: v for k, v in parameters.items() if k != "rope_theta"}}
    if "type" in merged:  # the name before transformers 4.43
        merged.setdefault("rope_type", merged.pop("type"))
        merged.pop("type", None)
    merged.pop("rope_theta", None)
    if merged.get("rope_type", "default") == "default":
        return theta, None
    return theta, merged


def _pick(cls: type[BaseConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}


def _one_of(*named: tuple[str, Any]) -> Any:
    """The value that several fields agree on (None: none is given); ConfigurationError when they disagree."""
    given = [(name, value) for name, value in named if value is not None]
    if any(value != given[0][1] for _, value in given):
        raise ConfigurationError("These fields contradict each other: " + ", ".join(f"{n} = {v!r}" for n, v in given))
    return given[0][1] if given else None


def _refuse_unknown(owner: str, values: Mapping[str, Any], known: Any) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigurationError(f"{owner} has no field {', '.join(unknown)}. Its fields: {', '.join(sorted(known))}.")


def _square(name: str, value: Any) -> int:
    if len(set(value)) != 1:
        raise ConfigurationError(f"{name} {value!r} is not square; only square tiles and patches are supported.")
    return int(value[0])


def _positive(config: Any, owner: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigurationError(f"{owner}.{name} must be a positive whole number; it is {value!r}.")


def _divides(config: Any, owner: str, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigurationError(
            f"{owner}.{part} {getattr(config, part)} does not divide {whole} {getattr(config, whole)}."
        )


def _activation(name: str, value: str) -> None:
    if value not in ACTIVATIONS:
        raise ConfigurationError(f"{name} {value!r} is not known; known activations: {', '.join(ACTIVATIONS)}.")
