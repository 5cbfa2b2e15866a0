"""LLaVA-Next (granite-vision, LLaVA-1.6): composition, ``forward`` and the hook for FMS's generate."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from torch import Tensor, nn

from smolvlm_fms.config_llava import LlavaNextConfig
from smolvlm_fms.errors import InputError, TokenCountError
from smolvlm_fms.model.decode import decode
from smolvlm_fms.model.lifecycle import finish
from smolvlm_fms.model.masks import grown_mask
from smolvlm_fms.model.multi_patch import MultiPatchVisionProcessor, create_multi_patch_processor
from smolvlm_fms.model.packing import pack
from smolvlm_fms.modules.clip_tower import ClipTower
from smolvlm_fms.modules.projector import LlavaNextProjector, join_tiles, tapped_features
from smolvlm_fms.modules.text import KVCache, TextModel
from smolvlm_fms.modules.vision import SiglipTower

__all__ = ["LlavaNext", "PictureFeatures", "pictures_per_row"]


class PictureFeatures(NamedTuple):
    """Encoded pictures of a batch, row after row: one tensor (image tokens, D) each; pictures differ in tokens.

    ``prompt_length``: placeholders after so many tokens are not theirs but a model's that happened to generate one.
    """

    features: tuple[Tensor, ...]
    prompt_length: int | None = None

    @property
    def tokens_per_picture(self) -> list[int]:
        """Image tokens of each picture."""
        return [len(feature) for feature in self.features]


class LlavaNext(nn.Module):
    """A LLaVA-Next vision-language model.

    pixel_values (M, N, C, H, W) ─┐       M pictures of all rows in order; their first N_m tiles are real
                                  ▼
      vision_tower  (ΣN_m, P, D_v · taps) hidden states of several layers side by side, no class token
                                  ▼
      projector     (ΣN_m, P, D)
                                  ▼
      join_tiles    M × (tokens_m, D)     overview; grid without its padding, image_newline after each line
                                  ▼
    input_ids (B, T) ─▶ embed (B, T, D) ─▶ pack: features at the <image> placeholders, counts checked per row
                                  ▼
      text_model    (B, T, D) ─▶ head ─▶ logits (B, T, V)      (Granite scales the image features, too)
    """

    # What FMS's loader reads of a checkpoint when only the vision part is asked for: its own names and Hugging Face's.
    VISION_ONLY_HF_PREFIXES = (
        *("vision_tower.", "projector.", "image_newline", "text_model.base_model.embedding."),
        *("multi_modal_projector.", "language_model.model.embed_tokens."),
        *("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"),
        "model.language_model.embed_tokens.",
    )

    def __init__(
        self,
        config: LlavaNextConfig | None = None,
        distributed_strategy: DistributedStrategy = NoOpStrategy,
        vision_only: bool = False,
        **changes: Any,
    ) -> None:
        """``changes`` override fields of ``config``, or are all of them. ``vision_only`` leaves out everything after
        the embeddings.
        """
        super().__init__()
        self.config = LlavaNextConfig.from_dict(changes) if config is None else config.updated(**changes)
        self.vision_only = self._vision_only = vision_only  # FMS's loader looks for the second name
        c = self.config
        parts: dict[str, Any] = {"fused_weights": c.fused_weights, "linear_config": c.linear_config}
        tower = ClipTower if c.vision.has_class_token else SiglipTower
        self.vision_tower = tower(c.vision, **parts)
        self.projector = LlavaNextProjector(
            c.vision.hidden_size * len(c.feature_layers),
            c.text.hidden_size,
            c.projector_hidden_act,
            c.multimodal_projector_bias,
        )
        self.image_newline = nn.Parameter(torch.empty(c.text.hidden_size))
        self.text_model = TextModel(
            c.text,
            tied=c.tie_word_embeddings,
            scale_logits=c.scale_logits,
            embedding_only=vision_only,
            distributed_strategy=distributed_strategy,
            **parts,
        )

    @classmethod
    def from_config(cls, config: LlavaNextConfig) -> LlavaNext:
        """Build a model with uninitialised weights (FMS's convention; ``reset_parameters`` initialises)."""
        return cls(config)

    def get_config(self) -> LlavaNextConfig:
        """The configuration that the model was built from."""
        return self.config

    def reset_parameters(self) -> None:
        """Initialise every weight at random."""
        for part in (self.vision_tower, self.projector, self.text_model):
            part.reset_parameters()
        nn.init.normal_(self.image_newline, std=self.config.text.hidden_size**-0.5)

    def post_init(self) -> None:
        """Tie the head where configured and compute RoPE tables; to be called once the weights are in place."""
        finish(self)

    @property
    def multi_patch(self) -> MultiPatchVisionProcessor:
        """What encodes this model's tiles, one by one; ``encode_images`` puts them together to pictures."""
        return create_multi_patch_processor(self._tap, self.projector, self.config.tokens_per_tile)

    def _tap(self, pixels_NCHW: Tensor, mask_NHW: Tensor | None = None) -> Tensor:
        if mask_NHW is not None:
            raise InputError("LLaVA-Next's tiles are whole; a patch mask came.")
        vision = self.config.vision
        if pixels_NCHW.shape[2:] != (vision.image_size, vision.image_size):
            raise InputError(
                f"A tile must have {vision.image_size} × {vision.image_size} pixels; {tuple(pixels_NCHW.shape)} came."
            )
        layers, drop = self.config.feature_layers, vision.has_class_token
        return tapped_features(self.vision_tower, pixels_NCHW, layers, drop_class_token=drop)

    def encode_images(
        self, pixel_values: Tensor | Sequence[Tensor], image_sizes: Tensor | Sequence[Sequence[int]]
    ) -> PictureFeatures:
        """Encode pictures into image tokens.

        ``pixel_values`` (M, N, C, H, W), padded to the picture with most tiles, or (tiles of all pictures, C, H, W), or
        a list of M tensors (tiles, C, H, W). ``image_sizes`` (M, 2), integers: each picture's original (height, width),
        which says how many of its tiles are real, how they lie and what of them is padding.
        """
        sizes = [(int(height), int(width)) for height, width in _rows(image_sizes)]
        if not sizes:
            return PictureFeatures(())
        geometry = self.config.resolution
        counts = [geometry.num_tiles(size) for size in sizes]
        tokens_NPD = self.encode_tiles(_real_tiles(pixel_values, counts))
        pictures = zip(torch.split(tokens_NPD, counts), sizes, strict=True)
        return PictureFeatures(tuple(self.join_picture(tiles_NPD, size) for tiles_NPD, size in pictures))

    def encode_tiles(self, tiles_NCHW: Tensor) -> Tensor:
        """Tower and projector alone: tiles (N, C, H, W), N ≥ 1, to their patches' tokens (N, P, D)."""
        embeddings_1TD, _ = self.multi_patch.process_patches(tiles_NCHW[None])
        return embeddings_1TD.view(len(tiles_NCHW), self.config.tokens_per_tile, -1)

    def join_picture(self, tokens_NPD: Tensor, size: tuple[int, int]) -> Tensor:
        """What ``encode_tiles`` made of one picture's tiles to its image tokens (T, D); ``size``: (height, width)."""
        geometry = self.config.resolution
        return join_tiles(tokens_NPD, self.image_newline, geometry.grid(size), geometry.padding(size))

    def embed_inputs(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        image_hidden_states: PictureFeatures | Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) and pictures to embeddings (B, T, D), before any embedding multiplier.

        ``image_hidden_states`` are features encoded earlier, or their concatenation (…, D); giving them and
        ``pixel_values`` both raises InputError. A row's placeholders must be filled by whole pictures, in order:
        otherwise TokenCountError.
        """
        embeddings_BTD = self.text_model.base_model.embed(input_ids)
        if pixel_values is not None and image_hidden_states is not None:
            raise InputError("Give pixel_values or image_hidden_states, not both.")
        if pixel_values is not None and len(pixel_values):
            if image_sizes is None:
                raise InputError("pixel_values came without image_sizes, (pictures, 2): each one's height and width.")
            image_hidden_states = self.encode_images(pixel_values, image_sizes)
        if image_hidden_states is None:
            return embeddings_BTD
        length = input_ids.shape[1]
        if isinstance(image_hidden_states, PictureFeatures) and image_hidden_states.prompt_length is not None:
            length = image_hidden_states.prompt_length
        packed_BTD = self._packed(embeddings_BTD[:, :length], input_ids[:, :length], image_hidden_states)
        return torch.cat((packed_BTD, embeddings_BTD[:, length:]), 1) if length < input_ids.shape[1] else packed_BTD

    def _packed(self, embeddings_BTD: Tensor, input_ids: Tensor, features: PictureFeatures | Tensor) -> Tensor:
        """``embeddings_BTD`` with image features at the placeholders of ``input_ids``; counts are checked."""
        placeholders = (input_ids == self.config.image_token_id).sum(1).tolist()
        if isinstance(features, PictureFeatures):
            pictures_per_row(placeholders, features.tokens_per_picture)
            if not features.features:
                return embeddings_BTD
            features = torch.cat(features.features)
        features_TD = features.reshape(-1, features.shape[-1])
        if sum(placeholders) != len(features_TD):
            raise TokenCountError(
                f"The batch has {sum(placeholders)} <image> placeholders, but {len(features_TD)} image features came."
            )
        return pack(embeddings_BTD, input_ids, features_TD[None], self.config.image_token_id)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value_states: KVCache | None = None,
        use_cache: bool = False,
        image_hidden_states: PictureFeatures | Tensor | None = None,
        last_n_tokens: int = 0,
        output_hidden_states: bool = False,
        logits_mask: Tensor | None = None,
        **attn_kwargs: Any,
    ) -> Any:
        """Return logits (B, T, V); with ``use_cache`` (logits, cache); with ``output_hidden_states`` the L + 1 hidden
        states of the text backbone, each (B, T, D), come last in the tuple.

        ``input_ids`` (B, T), int64, or embeddings (B, T, D), into which pictures are already packed. ``pixel_values``
        and ``image_sizes``: as in ``encode_images``, the pictures of all rows in order; a row may have any number.
        ``attention_mask`` (B, past + T): 1 for real tokens. ``position_ids`` (B, T): by default each real token's place
        in its row. ``last_n_tokens``: logits of that many last tokens only (0: all). ``logits_mask`` (B, T), bool:
        logits (K, V) of its K true places only. ``attn_kwargs`` go to FMS's attention.
        """
        inputs = input_ids
        if not input_ids.is_floating_point():
            inputs = self.embed_inputs(input_ids, pixel_values, image_sizes, image_hidden_states)
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
        pixels, sizes = left.pop("pixel_values", None), left.pop("image_sizes", None)
        if pixels is not None and len(pixels) and left.get("image_hidden_states") is None:
            if sizes is None:
                raise InputError("pixel_values came without image_sizes, (pictures, 2): each one's height and width.")
            features = self.encode_images(pixels, sizes)
            left["image_hidden_states"] = features._replace(prompt_length=input_ids.shape[1])
        if left.get("use_cache") and iteration > 0:
            left.pop("image_hidden_states", None)
        if left.get("attention_mask") is not None:
            cache = left.get("past_key_value_states")
            past = cache[0][0].shape[2] if cache else 0
            left["attention_mask"] = grown_mask(left["attention_mask"], past + input_ids.shape[1])
        return input_ids, left


def pictures_per_row(placeholders: Sequence[int], tokens_per_picture: Sequence[int]) -> list[int]:
    """How many pictures each row has, from its number of placeholders; the pictures come row after row.

    Raises TokenCountError where a row's placeholders are not filled by whole pictures, or pictures are left over.
    """
    counts, start = [], 0
    for row, wanted in enumerate(placeholders):
        end, given = start, 0
        while given < wanted and end < len(tokens_per_picture):
            given += tokens_per_picture[end]
            end += 1
        if given != wanted:
            sums = " + ".join(map(str, tokens_per_picture[start:end])) or "none"
            raise TokenCountError(
                f"Row {row}: the text has {wanted} <image> placeholders, but the pictures from number {start} on give "
                f"{given} image features ({sums}). Likely cause: the text was cut (truncation, max_length), a picture "
                "is missing, or the prompt was made for other sizes or with another patch_size, "
                "num_additional_image_tokens or vision_feature_select_strategy."
            )
        counts.append(end - start)
        start = end
    if start < len(tokens_per_picture):
        raise TokenCountError(
            f"Row {len(placeholders) - 1}: every row's <image> placeholders are filled, but "
            f"{len(tokens_per_picture) - start} of {len(tokens_per_picture)} pictures are left over. "
            "Likely cause: pictures were added without their placeholders."
        )
    return counts


def _rows(sizes: Tensor | Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    if any(len(row) != 2 for row in rows):
        raise InputError(f"image_sizes must be (pictures, 2): height and width; {sizes!r} came.")
    return rows


def _real_tiles(pixel_values: Tensor | Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The first ``counts[i]`` tiles of each picture, joined: (sum of counts, C, H, W)."""
    if isinstance(pixel_values, Tensor) and pixel_values.dim() == 4:
        if len(pixel_values) != sum(counts):
            raise InputError(
                f"pixel_values has {len(pixel_values)} tiles, but pictures of these image_sizes have {list(counts)}."
            )
        return pixel_values
    if len(pixel_values) != len(counts) or any(picture.dim() != 4 for picture in pixel_values):
        shape = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else f"{len(pixel_values)} tensors"
        raise InputError(
            "pixel_values must be (pictures, tiles, channels, height, width), with one row of image_sizes a picture; "
            f"{shape} and {len(counts)} sizes came."
        )
    for number, (picture, count) in enumerate(zip(pixel_values, counts, strict=True)):
        if len(picture) < count:
            raise InputError(
                f"Picture {number} came with {len(picture)} tiles, but its image_sizes and image_grid_pinpoints call "
                f"for {count}; was it processed with other pinpoints, or are its height and width swapped?"
            )
    return torch.cat([picture[:count] for picture, count in zip(pixel_values, counts, strict=True)])
