"""``to_hf_api``: one of our models as a transformers ``PreTrainedModel`` with ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMCausalLMOutputWithPast

from smolvlm_fms.errors import InputError
from smolvlm_fms.fms_bridge.loading import load_model
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.hf.attention import HF_ATTENTION, causal_mask
from smolvlm_fms.model.smolvlm import ImageFeatures

__all__ = ["FmsForConditionalGeneration", "to_hf_api"]


class FmsForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """One of this package's models behind transformers' interface; the weights are shared, not copied."""

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    base_model_prefix = "fms"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_attention_backend = False
    _supports_cache_class = True
    _supports_static_cache = True
    _no_split_modules = ("SiglipBlock", "LLaMABlock", "GraniteBlock")
    _skip_keys_device_placement = ("past_key_values",)
    fms: Any  # the FMS module: SmolVLM or LlavaNext

    def __init__(self, config: Any, fms_model: nn.Module | None = None) -> None:
        """``config`` is transformers' configuration; without ``fms_model`` a randomly initialised one is built."""
        super().__init__(config)
        # transformers decides the form of its masks by this field, which it sets for its own submodels only.
        config.get_text_config()._attn_implementation = "sdpa"
        self.fms = _build(config) if fms_model is None else fms_model
        self.loss_type = "ForCausalLM"
        self.vocab_size = self.text.config.vocab_size
        if self.fms.config.tie_word_embeddings:
            self._tied_weights_keys = _tied_keys()
        self.post_init()
        self.generation_config = GenerationConfig.from_model_config(config)

    @property
    def text(self) -> Any:
        """The text model (backbone and head)."""
        return self.fms.text_model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the weights were loaded or initialised with our own model."""

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.text.base_model.embedding
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text.base_model.embedding = value
        self._resized(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.text.head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.text.head = new_embeddings

    def _resized(self, embedding: Any) -> None:
        """Keep our own configuration true after transformers' ``resize_token_embeddings``."""
        size = embedding.weight.shape[0]
        self.fms.config = self.fms.config.updated(text={"vocab_size": size})
        self.text.config = self.text.base_model.config = self.fms.config.text

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Let head and embedding share their tensor where the configuration says so."""
        self.text.tie()

    def get_image_features(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **kwargs: Any
    ) -> ImageFeatures:
        """Encode pictures: features (M, tokens per tile, D) of all real tiles, and each row's number of tiles."""
        features: ImageFeatures = self.fms.encode_images(pixel_values, pixel_attention_mask, **kwargs)
        return features

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_hidden_states: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``SmolVLMForConditionalGeneration.forward``: same arguments, same output class."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Give exactly one of input_ids and inputs_embeds.")
        use_cache = self.config.get_text_config().use_cache if use_cache is None else use_cache
        if self.training and labels is not None and past_key_values is None:
            use_cache = False
        features = self._image_features(input_ids, pixel_values, pixel_attention_mask, image_hidden_states, kwargs)
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.fms.embed_inputs(input_ids, image_hidden_states=features)
        elif features is not None:
            raise InputError("Pictures need input_ids: they are placed at <image> token ids, which embeddings lack.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.get_text_config())
        hidden, states, weights = self._run_text(
            inputs_embeds, attention_mask, position_ids, past_key_values, bool(output_attentions)
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.text.logits(hidden if isinstance(keep, int) else hidden[:, keep])
        loss = None
        if labels is not None:
            loss_arguments = {n: v for n, v in kwargs.items() if n in ("num_items_in_batch", "ignore_index")}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **loss_arguments)
        output = SmolVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=states if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
            image_hidden_states=None if features is None else _tensor(features),
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _image_features(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        pixel_attention_mask: Tensor | None,
        encoded: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """Features of the pictures, however they came; None without pictures."""
        if pixel_values is not None and encoded is not None:
            raise InputError("Give pixel_values or image_hidden_states, not both.")
        if pixel_values is not None:
            extra = {"image_sizes": kwargs["image_sizes"]} if "image_sizes" in kwargs else {}
            if not extra:
                return self.fms.encode_images(pixel_values, pixel_attention_mask, input_ids)
            return self.fms.encode_images(pixel_values, **extra)
        if isinstance(encoded, list | tuple) and not isinstance(encoded, ImageFeatures):
            encoded = torch.cat(list(encoded))
        if isinstance(encoded, Tensor) and encoded.dim() == 2:  # transformers 5 joins all tiles' tokens
            encoded = encoded[None]
        return encoded

    def _run_text(
        self,
        embeddings_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        record: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
        batch, length = embeddings_BTD.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(length, device=embeddings_BTD.device)[None] + past
        position_ids = position_ids.expand(batch, length)
        mask = causal_mask(self.config.get_text_config(), embeddings_BTD, attention_mask, position_ids, cache)
        weights: list[Tensor] = []
        backbone = self.text.base_model
        backbone.reach(past + length)
        hidden, _, states = backbone(
            embeddings_BTD,
            position_ids=position_ids,
            past_key_value_states=[(cache, layer) for layer in range(len(backbone.layers))],
            use_cache=True,
            output_hidden_states=True,
            attn_name=HF_ATTENTION,
            mask=mask,
            is_causal_mask=mask is None and length > 1,
            **({"record_weights": weights} if record else {}),
        )
        return hidden, states, weights

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers': pictures go in with the prompt and are not encoded again."""
        pictures = {n: kwargs.pop(n, None) for n in ("pixel_values", "pixel_attention_mask", "image_hidden_states")}
        cache = kwargs.get("past_key_values")
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if cache is None or cache.get_seq_length() == 0:
            inputs |= pictures
        inputs.pop("cache_position", None)
        return inputs

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint folder under transformers' own names, loadable by both libraries."""
        save_pretrained(self.fms, Path(save_directory))
        self.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """Load a checkpoint folder or hub id with our loader; ``dtype``/``torch_dtype`` and ``device_map`` as usual."""
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        model = load_model(pretrained_model_name_or_path, dtype=dtype, device=_device(kwargs.pop("device_map", None)))
        return to_hf_api(model, cls)


def to_hf_api(model: Any, cls: Any = FmsForConditionalGeneration) -> Any:
    """Return ``model`` (SmolVLM, LlavaNext) as a transformers model. Weights are shared with ``model``.

    The result is a ``PreTrainedModel`` with ``generate``, usable by pipelines, Trainer, peft and TRL.
    """
    values = dict(model.config.to_hf())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.dtype = next(model.parameters()).dtype
    adapted = cls(config, model)
    return adapted.train(model.training)


def _build(config: Any) -> nn.Module:
    """A randomly initialised model of our own for transformers' ``config``."""
    from smolvlm_fms.config import SmolVLMConfig
    from smolvlm_fms.model.smolvlm import SmolVLM

    model = SmolVLM(SmolVLMConfig.from_hf(config.to_dict()))
    model.reset_parameters()
    model.post_init()
    return model


def _tied_keys() -> Any:
    """Which parameters share a tensor, in the form of the transformers at hand (5: a mapping, 4: a list)."""
    head, embedding = "fms.text_model.head.weight", "fms.text_model.base_model.embedding.weight"
    return {head: embedding} if isinstance(PreTrainedModel._tied_weights_keys, dict) or _is_v5() else [head]


def _is_v5() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def _tensor(features: Any) -> Tensor:
    tensor: Tensor = features.features if isinstance(features, ImageFeatures) else features
    return tensor


def _device(device_map: Any) -> str:
    """A single device for ``device_map``; these models are small enough for one."""
    if isinstance(device_map, dict):
        places = set(device_map.values())
        if len(places) != 1:
            raise InputError(f"device_map spreads the model over {sorted(map(str, places))}; one device is supported.")
        device_map = places.pop()
    if device_map in ("auto", "balanced", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device_map is None else str(device_map)
