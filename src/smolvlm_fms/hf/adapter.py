"""``to_hf_api``: one of our models as a transformers ``PreTrainedModel`` with ``generate``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.smolvlm.modeling_smolvlm import (
    SmolVLMBaseModelOutputWithPast,
    SmolVLMCausalLMOutputWithPast,
)

from smolvlm_fms.errors import InputError
from smolvlm_fms.fms_bridge.loading import load_model, resolve_folder
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.hf.attention import HF_ATTENTION, causal_mask
from smolvlm_fms.model.llava_next import PictureFeatures
from smolvlm_fms.model.smolvlm import ImageFeatures

log = logging.getLogger(__name__)

__all__ = ["FmsForConditionalGeneration", "FmsModel", "FmsVisionTransformer", "to_hf_api"]


class FmsPreTrainedModel(PreTrainedModel):
    """What the adapted models share: one of this package's models as ``fms``; weights are shared, not copied."""

    main_input_name = "input_ids"
    input_modalities: tuple[str, ...] = ("image", "text")
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
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
        self._adopt(new_model(config.to_dict()) if fms_model is None else fms_model)
        self.vocab_size = self.text.config.vocab_size
        if self.fms.config.tie_word_embeddings:
            self._tied_weights_keys = _tied_keys(next(n for n, m in self.named_modules() if m is self.text))
        self.post_init()

    def _adopt(self, fms_model: nn.Module) -> None:
        self.fms = fms_model

    @property
    def text(self) -> Any:
        """The text model (backbone and head)."""
        return self.fms.text_model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the weights were loaded or initialised with our own model."""

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.text.base_model.embedding
        return embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.text.base_model.embedding = value
        # Keep our own configuration true after transformers' resize_token_embeddings.
        self.fms.config = self.fms.config.updated(text={"vocab_size": value.weight.shape[0]})
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

    def _encode(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        pixel_attention_mask: Tensor | None,
        encoded: Any,
        image_sizes: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """Embeddings (B, T, D) with pictures packed in, and the pictures' features (None without pictures)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Give exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and encoded is not None:
            raise InputError("Give pixel_values or image_hidden_states, not both.")
        if pixel_values is not None and image_sizes is not None:
            encoded = self.fms.encode_images(pixel_values, image_sizes)
        elif pixel_values is not None:
            encoded = self.fms.encode_images(pixel_values, pixel_attention_mask, input_ids)
        elif isinstance(encoded, list | tuple) and not isinstance(encoded, ImageFeatures | PictureFeatures):
            encoded = torch.cat(list(encoded))
        if isinstance(encoded, Tensor) and encoded.dim() == 2:  # transformers 5 joins all tiles' tokens
            encoded = encoded[None]
        if input_ids is not None:
            return self.fms.embed_inputs(input_ids, image_hidden_states=encoded), encoded
        if encoded is not None:
            raise InputError("Pictures need input_ids: they are placed at <image> token ids, which embeddings lack.")
        assert inputs_embeds is not None
        return inputs_embeds, None

    def _run_text(
        self,
        embeddings_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        record: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
        """Normed hidden states (B, T, D), all hidden states, and attention weights where they are recorded."""
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
            cache_position=torch.arange(past, past + length, device=embeddings_BTD.device),
            **({"record_weights": weights} if record else {}),
        )
        return hidden, states, weights

    def _cache_for(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to write to: the caller's, a new one where caching is on, or none."""
        use_cache = self.config.get_text_config().use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            return DynamicCache(config=self.config.get_text_config())
        return cache

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint folder under transformers' own names, loadable by both libraries."""
        save_pretrained(self.fms, Path(save_directory))
        if isinstance(self, GenerationMixin):
            self.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """Load a checkpoint folder or hub id with our loader; ``dtype``/``torch_dtype`` and ``device_map`` as usual.

        Raises InputError for options that would change the result and that this loader does not have.
        """
        unknown = sorted({name for name in kwargs if not name.startswith("_")} - _LOADING_OPTIONS)
        if args or unknown:
            known = ", ".join(sorted(_LOADING_OPTIONS))
            raise InputError(f"from_pretrained does not take {unknown or args}; known options: {known}.")
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        folder = resolve_folder(pretrained_model_name_or_path, **hub)
        model = load_model(folder, dtype=dtype, device=_device(kwargs.get("device_map")))
        adapted: Self = to_hf_api(model, cls)
        if isinstance(adapted, GenerationMixin):
            try:
                adapted.generation_config = GenerationConfig.from_pretrained(folder)
            except OSError:
                log.debug("%s has no generation_config.json; config.json's tokens are used", folder)
        return adapted


# attn_implementation: it is always scaled dot-product attention, computed in full where weights are asked for.
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_LOADING_OPTIONS = {
    "dtype", "torch_dtype", "device_map", "config", "trust_remote_code", "attn_implementation", "low_cpu_mem_usage",
    "use_safetensors", "adapter_kwargs", "code_revision", *_HUB_OPTIONS,
}  # fmt: skip


class FmsModel(FmsPreTrainedModel):
    """Tower, connector and text backbone without the head: transformers' ``SmolVLMModel``."""

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
        image_sizes: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """transformers' ``SmolVLMModel.forward``: last hidden states (B, T, D) and what else is asked for."""
        embeddings, features = self._encode(
            input_ids, inputs_embeds, pixel_values, pixel_attention_mask, image_hidden_states, image_sizes
        )
        cache = self._cache_for(past_key_values, use_cache)
        hidden, states, weights = self._run_text(
            embeddings, attention_mask, position_ids, cache, bool(output_attentions)
        )
        output = SmolVLMBaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=states if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
            image_hidden_states=None if features is None else _tensor(features),
        )
        return output if return_dict is None or return_dict else output.to_tuple()


class FmsVisionTransformer(FmsPreTrainedModel):
    """The vision tower alone: transformers' ``SmolVLMVisionTransformer``."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def forward(
        self,
        pixel_values: Tensor,
        patch_attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Pixels (N, C, H, W) to patch features (N, P, D); ``patch_attention_mask`` (N, H / p, W / p), bool."""
        features, states = self.fms.vision_tower(pixel_values, patch_attention_mask, output_hidden_states=True)
        output = BaseModelOutputWithPooling(
            last_hidden_state=features, hidden_states=states if output_hidden_states else None
        )
        return output if return_dict is None or return_dict else output.to_tuple()


class FmsForConditionalGeneration(FmsPreTrainedModel, GenerationMixin):
    """One of this package's models behind transformers' interface, with ``generate``."""

    accepts_loss_kwargs = True

    def __init__(self, config: Any, fms_model: nn.Module | None = None) -> None:
        super().__init__(config, fms_model)
        self.loss_type = "ForCausalLM"
        self.generation_config = GenerationConfig.from_model_config(config)

    def _adopt(self, fms_model: nn.Module) -> None:
        # Trainers that compute the head themselves run ``base_model``; it must return hidden states as transformers'.
        self.model = FmsModel(self.config, fms_model)

    @property
    def fms(self) -> Any:
        """The FMS module: SmolVLM or LlavaNext."""
        return self.model.fms

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.text.head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.text.head = new_embeddings

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
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``SmolVLMForConditionalGeneration.forward``: same arguments, same output class."""
        embeddings, features = self._encode(
            input_ids, inputs_embeds, pixel_values, pixel_attention_mask, image_hidden_states, image_sizes
        )
        cache = self._cache_for(past_key_values, use_cache)
        hidden, states, weights = self._run_text(
            embeddings, attention_mask, position_ids, cache, bool(output_attentions)
        )
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            hidden = hidden[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)]
        logits = self.text.logits(hidden)
        loss = None
        if labels is not None:
            loss_arguments = {n: v for n, v in kwargs.items() if n in ("num_items_in_batch", "ignore_index")}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **loss_arguments)
        output = SmolVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=states if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
            image_hidden_states=None if features is None else _tensor(features),
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers': pictures go in with the prompt and are not encoded again."""
        names = ("pixel_values", "pixel_attention_mask", "image_hidden_states", "image_sizes")
        pictures = {n: kwargs.pop(n, None) for n in names}
        cache = kwargs.get("past_key_values")
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if cache is None or cache.get_seq_length() == 0:
            inputs |= pictures
        inputs.pop("cache_position", None)
        return inputs


def to_hf_api(model: Any, cls: Any = FmsForConditionalGeneration) -> Any:
    """Return ``model`` (SmolVLM, LlavaNext) as a transformers model. Weights are shared with ``model``.

    The result is a ``PreTrainedModel`` with ``generate``, usable by pipelines, Trainer, peft and TRL. With ``cls`` a
    part of it: FmsModel (no head) or FmsVisionTransformer (the tower).
    """
    if not isinstance(model.text_model.base_model.embedding, nn.Embedding):
        raise InputError(
            "This model's weights are packed for the CPU kernels, which neither train nor save. Load it with "
            "smolvlm_fms.load(..., packed=False), or with fms_bridge.loading.load_model."
        )
    values = dict(model.config.to_hf())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.dtype = next(model.parameters()).dtype
    adapted = cls(config, model)
    return adapted.train(model.training)


def new_model(values: dict[str, Any]) -> Any:
    """A randomly initialised model of our own for the ``config.json`` of a transformers checkpoint."""
    architecture = architecture_of(values.get("model_type"))
    config: Any = architecture.config
    model = architecture.model_class()(config.from_hf(values))
    model.reset_parameters()
    model.post_init()
    return model


def _tied_keys(text: str) -> Any:
    """Which parameters of the module ``text`` share a tensor, as the transformers at hand wants it (4: a list)."""
    head, embedding = f"{text}.head.weight", f"{text}.base_model.embedding.weight"
    return {head: embedding} if _is_v5() else [head]


def _is_v5() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def _tensor(features: Any) -> Tensor:
    """Image features as one tensor, as transformers returns them."""
    if isinstance(features, PictureFeatures):
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in features.features])
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
