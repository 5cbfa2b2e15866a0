"""``to_hf_api``: one of our models as a transformers ``PreTrainedModel`` with ``generate``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.modeling_idefics3 import (
    Idefics3BaseModelOutputWithPast,
    Idefics3CausalLMOutputWithPast,
)
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextModelOutputWithPast,
)
from transformers.models.smolvlm.modeling_smolvlm import (
    SmolVLMBaseModelOutputWithPast,
    SmolVLMCausalLMOutputWithPast,
)

from smolvlm_fms.errors import InputError
from smolvlm_fms.fms_bridge.loading import load_model, resolve_folder
from smolvlm_fms.fms_bridge.register import architecture_of
from smolvlm_fms.fms_bridge.saving import save_pretrained
from smolvlm_fms.hf.attention import HF_ATTENTION, causal_mask
from smolvlm_fms.hf.configuration import hf_config
from smolvlm_fms.hf.pictures import IS_V5, PICTURE_INPUTS, encode, flat, given_features, pooled, resume
from smolvlm_fms.model.llava_next import LlavaNext
from smolvlm_fms.model.smolvlm import SmolVLM
from smolvlm_fms.modules.attention import PLAIN

log = logging.getLogger(__name__)

__all__ = ["FmsForConditionalGeneration", "FmsModel", "FmsVisionTransformer", "to_hf_api"]

_OUTPUTS: dict[str, tuple[Any, Any]] = {
    "smolvlm": (SmolVLMBaseModelOutputWithPast, SmolVLMCausalLMOutputWithPast),
    "idefics3": (Idefics3BaseModelOutputWithPast, Idefics3CausalLMOutputWithPast),
    "llava_next": (LlavaNextModelOutputWithPast, LlavaNextCausalLMOutputWithPast),
}
"""Per model type: what transformers' own model returns without the head, and with it."""


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
    _no_split_modules = ("SiglipBlock", "TextBlock")
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

    def _output(self, head: int) -> Any:
        return _OUTPUTS[self.config.model_type][head]

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
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        *,
        image_sizes: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Encode pictures; the result is that of the transformers at hand (``pictures.pooled``).

        LLaVA-Next takes ``image_sizes`` where SmolVLM takes ``pixel_attention_mask``, also by position.
        """
        if isinstance(self.fms, LlavaNext) and image_sizes is None:
            pixel_attention_mask, image_sizes = None, pixel_attention_mask
        states: list[Tensor] = []
        hook = self.fms.vision_tower.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        try:
            features = encode(self.fms, pixel_values, pixel_attention_mask, image_sizes)
        finally:
            hook.remove()
        output = pooled(features, states)
        return output.to_tuple() if return_dict is False and hasattr(output, "to_tuple") else output

    def _encode(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, pictures: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Embeddings (B, T, D) with ``pictures`` packed in, and their features (None without pictures)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Give exactly one of input_ids and inputs_embeds.")
        encoded = given_features(pictures.pop("image_hidden_states"), pictures.pop("mm_encoder_outputs"))
        if pictures["pixel_values"] is not None and encoded is not None:
            raise InputError("Give pixel_values or image_hidden_states (mm_encoder_outputs), not both.")
        if inputs_embeds is not None:
            if encoded is not None or pictures["pixel_values"] is not None:
                raise InputError("Pictures need input_ids: they stand at <image> token ids, which embeddings lack.")
            return inputs_embeds, None
        if pictures["pixel_values"] is not None:
            encoded = encode(self.fms, **pictures, input_ids=input_ids)
        return self.fms.embed_inputs(input_ids, image_hidden_states=encoded), encoded

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
        options: dict[str, Any] = {"attn_name": PLAIN}
        if cache is not None or record:  # else as in training: layers may be recomputed (gradient checkpointing)
            options = {
                "past_key_value_states": [(cache, layer) for layer in range(len(backbone.layers))],
                "use_cache": True,
                "attn_name": HF_ATTENTION,
                "cache_position": torch.arange(past, past + length, device=embeddings_BTD.device),
                **({"record_weights": weights} if record else {}),
            }
        hidden, _, states = backbone(
            embeddings_BTD,
            position_ids=position_ids,
            output_hidden_states=True,
            mask=mask,
            is_causal_mask=mask is None and length > 1,
            **options,
        )
        return hidden, states, weights

    def _cache_for(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to write to: the caller's, a new one where caching is on, or none."""
        for config in (self.config, self.config.get_text_config()):
            use_cache = getattr(config, "use_cache", None) if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            return DynamicCache(config=self.config.get_text_config())
        return cache

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint folder under transformers' own names, loadable by both libraries."""
        save_pretrained(self.fms, Path(save_directory))
        if isinstance(self, GenerationMixin):
            self.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_fms_model(cls, model: nn.Module, **overrides: Any) -> Self:
        """``to_hf_api(model, cls, **overrides)``, under the name that FMS's own adapted models give it."""
        adapted: Self = to_hf_api(model, cls, **overrides)
        return adapted

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """Load a checkpoint folder or hub id with our loader; ``dtype``/``torch_dtype`` and ``device_map`` as usual.

        The result is transformers' model of the checkpoint also where that differs from ours: its LLaVA-Next does not
        divide Granite's logits. ``to_hf_api`` leaves a model's logits as they are.

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
        changes = _as_transformers(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model = load_model(folder, dtype=dtype, device=_device(kwargs.get("device_map")), **changes)
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
        mm_encoder_outputs: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """transformers' ``SmolVLMModel.forward``: last hidden states (B, T, D) and what else is asked for."""
        given = (pixel_values, pixel_attention_mask, image_sizes, image_hidden_states, mm_encoder_outputs)
        embeddings, features = self._encode(input_ids, inputs_embeds, dict(zip(PICTURE_INPUTS, given, strict=True)))
        cache = self._cache_for(past_key_values, use_cache)
        hidden, states, weights = self._run_text(
            embeddings, attention_mask, position_ids, cache, bool(output_attentions)
        )
        output = self._output(0)(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=states if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
            image_hidden_states=None if features is None else flat(features),
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
        mm_encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``SmolVLMForConditionalGeneration.forward``: same arguments, same output class."""
        given = (pixel_values, pixel_attention_mask, image_sizes, image_hidden_states, mm_encoder_outputs)
        embeddings, features = self._encode(input_ids, inputs_embeds, dict(zip(PICTURE_INPUTS, given, strict=True)))
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
        output = self._output(1)(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=states if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
            image_hidden_states=None if features is None else flat(features),
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _supports_mm_encoder_outputs(self) -> bool:
        """No: transformers 5 would encode pictures before ``generate`` and hand them to an assistant model, too, whose
        features are not these. Where it helps, ``_expand_inputs_for_generation`` does it.
        """
        return False

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """As transformers', but pictures are encoded here, once, and from now on are part of the prompt's embeddings.

        So each copy of a row has that row's pictures (transformers repeats the first axis of every tensor, which in
        LLaVA-Next's is that of all rows' pictures), and an ``<image>`` that was written, or copied from the prompt as
        a candidate, is no placeholder.
        """
        shown = {name: kwargs.pop(name, None) for name in PICTURE_INPUTS}
        if any(value is not None for value in shown.values()):
            if input_ids is None or not input_ids.shape[1]:
                raise InputError("Pictures need input_ids: they stand at <image> token ids, which embeddings lack.")
            embeddings_BTD, _ = self._encode(input_ids, None, dict(shown))
            kwargs |= {"prompt_ids": input_ids, "prompt_embeddings": embeddings_BTD}
        expanded: tuple[Any, dict[str, Any]] = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if "prompt_ids" in kwargs:
            expanded[1]["prompt_pictures"] = shown
        return expanded

    def _get_candidate_generator(self, *arguments: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. An assistant is given the pictures, not what this model made of them."""
        theirs = {name: value for name, value in model_kwargs.items() if not name.startswith("prompt_")}
        theirs |= {n: v for n, v in model_kwargs.get("prompt_pictures", {}).items() if v is not None}
        return super()._get_candidate_generator(*arguments, model_kwargs=theirs, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers' (which looks for ``inputs_embeds`` among the arguments); where the prompt is concerned, its
        embeddings with pictures in them.
        """
        own = {name: kwargs.pop(name, None) for name in ("prompt_ids", "prompt_embeddings", "prompt_pictures")}
        kwargs["inputs_embeds"] = inputs_embeds
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("cache_position", None)
        if own["prompt_ids"] is not None:
            cache, ids = kwargs.get("past_key_values"), inputs["input_ids"]
            cached = 0 if cache is None else int(cache.get_seq_length())
            prompt = own["prompt_ids"], own["prompt_embeddings"]
            embeddings = resume(*prompt, input_ids.shape[1], ids, cached, self.text.base_model.embed)
            if embeddings is not None:
                inputs |= {"input_ids": None, "inputs_embeds": embeddings}
        return inputs


def to_hf_api(model: Any, cls: Any = FmsForConditionalGeneration, **overrides: Any) -> Any:
    """Return ``model`` (SmolVLM, LlavaNext) as a transformers model. Weights are shared with ``model``.

    The result is a ``PreTrainedModel`` with ``generate``, usable by pipelines, Trainer, peft and TRL. With ``cls`` a
    part of it: FmsModel (no head) or FmsVisionTransformer (the tower). ``overrides`` are fields of transformers'
    configuration (``use_cache``, ``pad_token_id`` …), as in FMS's function of this name; InputError for a field that
    it does not have, or that says otherwise than the model is built.
    """
    _check_adaptable(model, cls)
    config = hf_config(model.config, **overrides)
    config.dtype = next(model.parameters()).dtype
    adapted = cls(config, model)
    return adapted.train(model.training)


def _check_adaptable(model: Any, cls: Any) -> None:
    """Raise InputError, with what to do, for what is no whole model of ours or no class of this module."""
    if not (isinstance(cls, type) and issubclass(cls, FmsPreTrainedModel)):
        raise InputError(
            f"cls must be FmsForConditionalGeneration, FmsModel or FmsVisionTransformer (or derived); {cls!r} came."
        )
    if isinstance(model, FmsPreTrainedModel):
        raise InputError(f"This is a transformers model already: {type(model).__name__}. Its FMS model is .fms.")
    if not isinstance(model, SmolVLM | LlavaNext):
        inner = getattr(model, "model", None)
        hint = " Pass its .model." if isinstance(inner, SmolVLM | LlavaNext) else ""
        raise InputError(f"to_hf_api takes a SmolVLM or a LlavaNext; {type(model).__name__} came.{hint}")
    if not isinstance(model.text_model.base_model.embedding, nn.Embedding):
        raise InputError(
            "This model's weights are packed for the CPU kernels, which neither train nor save. Load it with "
            "smolvlm_fms.load(..., packed=False), or with fms_bridge.loading.load_model."
        )
    if model.vision_only and not issubclass(cls, FmsVisionTransformer):
        raise InputError(
            f"This model was loaded with vision_only=True and has no text backbone, which {cls.__name__} needs. Load "
            "it whole, or take its tower: to_hf_api(model, FmsVisionTransformer)."
        )


def new_model(values: dict[str, Any]) -> Any:
    """A randomly initialised model of our own for the ``config.json`` of a transformers checkpoint."""
    architecture = architecture_of(values.get("model_type"))
    config: Any = architecture.config
    model = architecture.model_class()(config.from_hf(values), **_as_transformers(values))
    model.reset_parameters()
    model.post_init()
    return model


def _as_transformers(values: dict[str, Any]) -> dict[str, Any]:
    """Changes to our configuration of a ``config.json`` that make the model compute what transformers' does."""
    return {"scale_logits": False} if values.get("model_type") == "llava_next" else {}


def _tied_keys(text: str) -> Any:
    """Which parameters of the module ``text`` share a tensor, as the transformers at hand wants it (4: a list)."""
    head, embedding = f"{text}.head.weight", f"{text}.base_model.embedding.weight"
    return {head: embedding} if IS_V5 else [head]


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
