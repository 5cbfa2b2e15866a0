"""SmolVLM and Idefics3: composition, ``forward`` and the hook for FMS's generate."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from torch import Tensor, nn

from smolvlm_fms.config import SmolVLMConfig
from smolvlm_fms.errors import InputError
from smolvlm_fms.model.decode import decode
from smolvlm_fms.model.lifecycle import finish
from smolvlm_fms.model.masks import grown_mask
from smolvlm_fms.model.multi_patch import MultiPatchVisionProcessor, create_multi_patch_processor
from smolvlm_fms.model.packing import count_tiles, pack, patch_mask
from smolvlm_fms.modules.connector import Idefics3Connector
from smolvlm_fms.modules.text import KVCache, TextModel
from smolvlm_fms.modules.vision import SiglipTower

__all__ = ["ImageFeatures", "SmolVLM"]


class ImageFeatures(NamedTuple):
    """Encoded tiles of a batch: ``features`` (M, tokens per tile, D), row after row, and each row's tile count.

    ``prompt_length``: placeholders after so many tokens are not theirs but a model's that happened to generate one.
    """

    features: Tensor
    tiles_per_row: list[int]
    prompt_length: int | None = None


class SmolVLM(nn.Module):
    """A vision-language model of the SmolVLM family.

    pixel_values (B, N, C, H, W) ─┐
                                  ▼
      vision_tower  (M, P, D_v)         M real tiles; padding tiles are left out
                                  ▼
      connector     (M, tokens, D)      pixel unshuffle, projection
                                  ▼
    input_ids (B, T) ─▶ embed (B, T, D) ─▶ pack: features at the <image> placeholders
                                  ▼
      text_model    (B, T, D) ─▶ head ─▶ logits (B, T, V)
    """

    # What FMS's loader reads of a checkpoint when only the vision part is asked for: its own names and Hugging Face's.
    VISION_ONLY_HF_PREFIXES = (
        *("vision_tower.", "connector.", "text_model.base_model.embedding."),
        *("model.vision_model.", "model.connector.", "model.text_model.embed_tokens."),
        *("vision_model.", "text_model.embed_tokens."),
    )

    def __init__(
        self,
        config: SmolVLMConfig | None = None,
        distributed_strategy: DistributedStrategy = NoOpStrategy,
        vision_only: bool = False,
        **changes: Any,
    ) -> None:
        """``changes`` override fields of ``config``, or are all of them. ``vision_only`` leaves out everything after
        the embeddings.
        """
        super().__init__()
        self.config = SmolVLMConfig.from_dict(changes) if config is None else config.updated(**changes)
        self.vision_only = self._vision_only = vision_only  # FMS's loader looks for the second name
        c = self.config
        parts: dict[str, Any] = {"fused_weights": c.fused_weights, "linear_config": c.linear_config}
        self.vision_tower = SiglipTower(c.vision, **parts)
        self.connector = Idefics3Connector(c.vision.hidden_size, c.text.hidden_size, c.scale_factor)
        self.text_model = TextModel(
            c.text,
            tied=c.tie_word_embeddings,
            scale_logits=False,  # transformers' model of this name does not
            embedding_only=vision_only,
            distributed_strategy=distributed_strategy,
            **parts,
        )

    @classmethod
    def from_config(cls, config: SmolVLMConfig) -> SmolVLM:
        """Build a model with uninitialised weights (FMS's convention; ``reset_parameters`` initialises)."""
        return cls(config)

    def get_config(self) -> SmolVLMConfig:
        """The configuration that the model was built from."""
        return self.config

    def reset_parameters(self) -> None:
        """Initialise every weight at random."""
        for part in (self.vision_tower, self.connector, self.text_model):
            part.reset_parameters()

    def post_init(self) -> None:
        """Tie the head where configured and compute RoPE tables; to be called once the weights are in place."""
        finish(self)

    @property
    def multi_patch(self) -> MultiPatchVisionProcessor:
        """What encodes this model's tiles."""
        return create_multi_patch_processor(self.vision_tower, self.connector, self.config.tokens_per_tile)

    def encode_images(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, input_ids: Tensor | None = None
    ) -> ImageFeatures:
        """Encode tiles ``pixel_values`` (B, N, C, H, W) into image tokens.

        ``pixel_attention_mask`` (B, N, H, W) marks real pixels; a tile without any is padding and left out. Without
        the mask, ``input_ids`` (B, T) say how many tiles each row means; without either all N tiles are real.
        """
        if pixel_values.dim() != 5:
            raise InputError(
                f"pixel_values must be (batch, tiles, channels, height, width); {tuple(pixel_values.shape)} came."
            )
        batch, count = pixel_values.shape[:2]
        if pixel_attention_mask is not None and pixel_attention_mask.shape != pixel_values[:, :, 0].shape:
            raise InputError(
                f"pixel_attention_mask {tuple(pixel_attention_mask.shape)} does not belong to pixel_values "
                f"{tuple(pixel_values.shape)}; it must be (batch, tiles, height, width)."
            )
        if pixel_attention_mask is None and input_ids is None:
            real_BN = torch.ones(batch, count, dtype=torch.bool, device=pixel_values.device)
        else:
            placeholders = [] if input_ids is None else (input_ids == self.config.image_token_id).sum(1).tolist()
            real_BN = count_tiles(pixel_values, pixel_attention_mask, placeholders, self.config.tokens_per_tile)
        tiles_MCHW = pixel_values[real_BN]
        if not len(tiles_MCHW):
            return ImageFeatures(
                tiles_MCHW.new_zeros(0, self.config.tokens_per_tile, self.config.text.hidden_size), [0] * batch
            )
        mask_1MHW = None
        if pixel_attention_mask is not None:
            mask_MHW = pixel_attention_mask[real_BN]
            if not bool(mask_MHW.all()):
                mask_1MHW = patch_mask(mask_MHW, self.config.vision.patch_size)[None]
        embeddings_1TD, _ = self.multi_patch.process_patches(tiles_MCHW[None], mask_1MHW)
        features = embeddings_1TD.view(len(tiles_MCHW), self.config.tokens_per_tile, -1)
        return ImageFeatures(features, real_BN.sum(1).tolist())

    def embed_inputs(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_hidden_states: ImageFeatures | Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) and pictures to embeddings (B, T, D), before any embedding multiplier.

        ``image_hidden_states`` are features encoded earlier; giving them and ``pixel_values`` both raises InputError.
        """
        embeddings_BTD = self.text_model.base_model.embed(input_ids)
        if pixel_values is not None and image_hidden_states is not None:
            raise InputError("Give pixel_values or image_hidden_states, not both.")
        if pixel_values is not None:
            image_hidden_states = self.encode_images(pixel_values, pixel_attention_mask, input_ids)
        if image_hidden_states is None:
            return embeddings_BTD
        if not isinstance(image_hidden_states, ImageFeatures):
            return pack(embeddings_BTD, input_ids, image_hidden_states, self.config.image_token_id)
        features, tiles, length = image_hidden_states
        packed = pack(embeddings_BTD[:, :length], input_ids[:, :length], features, self.config.image_token_id, tiles)
        return packed if length is None else torch.cat((packed, embeddings_BTD[:, length:]), 1)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value_states: KVCache | None = None,
        use_cache: bool = False,
        image_hidden_states: ImageFeatures | Tensor | None = None,
        last_n_tokens: int = 0,
        output_hidden_states: bool = False,
        logits_mask: Tensor | None = None,
        **attn_kwargs: Any,
    ) -> Any:
        """Return logits (B, T, V); with ``use_cache`` (logits, cache); with ``output_hidden_states`` the L + 1 hidden
        states of the text backbone, each (B, T, D), come last in the tuple.

        ``input_ids`` (B, T), int64, or embeddings (B, T, D), into which pictures are already packed.
        ``pixel_values`` (B, N, C, H, W) and ``pixel_attention_mask`` (B, N, H, W): the tiles of each row, padded to the
        row with most. ``attention_mask`` (B, past + T): 1 for real tokens. ``position_ids`` (B, T): by default each
        real token's place in its row. ``last_n_tokens``: logits of that many last tokens only (0: all).
        ``logits_mask`` (B, T), bool: logits (K, V) of its K true places only, row after row (training needs no others).
        ``attn_kwargs`` go to FMS's attention (``attn_name``, ``mask`` …); a ``mask`` there replaces ours.
        """
        inputs = input_ids
        if not input_ids.is_floating_point():
            inputs = self.embed_inputs(input_ids, pixel_values, pixel_attention_mask, image_hidden_states)
        elif pixel_values is not None or image_hidden_states is not None:
            raise InputError("Embeddings came where token ids are needed: pictures are placed at <image> token ids.")
        return decode(
            self.text_model,
            inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value_states=past_key_value_states,
            use_cache=use_cache,
            last_n_tokens=last_n_tokens,
            output_hidden_states=output_hidden_states,
            logits_mask=logits_mask,
            **attn_kwargs,
        )

    def prepare_inputs(
        self, iteration: int, input_ids: Tensor, kwargs: MutableMapping[str, Any]
    ) -> tuple[Tensor, MutableMapping[str, Any]]:
        """Hook for ``fms.utils.generation.generate(..., prepare_model_inputs_hook=model.prepare_inputs)``.

        Pictures in ``kwargs`` are encoded once, on the first iteration; ``forward`` packs their features, and with a
        cache needs them no more. An ``attention_mask`` grows with the text, which FMS's generate leaves to its models.
        Returns the ids and the arguments that are left for ``forward``.
        """
        left = dict(kwargs)
        pixels, mask = left.pop("pixel_values", None), left.pop("pixel_attention_mask", None)
        if pixels is not None and left.get("image_hidden_states") is None:
            features = self.encode_images(pixels, mask, input_ids)
            left["image_hidden_states"] = features._replace(prompt_length=input_ids.shape[1])
        if left.get("use_cache") and iteration > 0:
            left.pop("image_hidden_states", None)
        if left.get("attention_mask") is not None:
            cache = left.get("past_key_value_states")
            past = cache[0][0].shape[2] if cache else 0
            left["attention_mask"] = grown_mask(left["attention_mask"], past + input_ids.shape[1])
        return input_ids, left
