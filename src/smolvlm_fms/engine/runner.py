"""The exact path: the model's own blocks on a static KV cache, any dtype, any device.

FMS's attention grows its cache with ``torch.cat``, one row length for all. Here the cache is one static tensor a layer,
(tokens, kv_heads, head_dim), in which every sequence owns a run; an attention operation registered with FMS writes new
keys and values there and lets each row attend to its own run. A row's result therefore does not depend on its
neighbours' lengths, and the blocks themselves stay FMS's.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
import torch.nn.functional as F
from fms.modules.attention import register_attention_op
from torch import Tensor

from smolvlm_fms.engine.config import BLOCK
from smolvlm_fms.engine.sampler import sample
from smolvlm_fms.engine.scheduler import placeholders_between
from smolvlm_fms.engine.sequence import Picture, Sampled, Sequence
from smolvlm_fms.errors import CapacityError, InputError
from smolvlm_fms.model.llava_next import LlavaNext
from smolvlm_fms.model.smolvlm import SmolVLM

__all__ = ["ModelRunner", "embed_prompt", "kv_bytes_per_token"]

ATTENTION = "smolvlm_extents"

Rows = list[tuple[int, int]]
"""Per row of a batch: where its run of the cache starts, and how many tokens are in it already."""


def _store(
    keys_BTHD: Tensor, values_BTHD: Tensor, key_cache: Tensor, value_cache: Tensor, *, rows: Rows, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write new keys and values behind what each row has."""
    length = keys_BTHD.shape[1]
    if length == 1:
        places = torch.tensor([start + past for start, past in rows], device=keys_BTHD.device)
        key_cache.index_copy_(0, places, keys_BTHD[:, 0])
        value_cache.index_copy_(0, places, values_BTHD[:, 0])
    else:
        for row, (start, past) in enumerate(rows):
            key_cache[start + past : start + past + length] = keys_BTHD[row]
            value_cache[start + past : start + past + length] = values_BTHD[row]
    return key_cache, value_cache, key_cache, value_cache


def _attend(
    query_BTHD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    nheads: int,
    kvheads: int,
    p_dropout: float,
    scale_factor: float | None,
    *,
    rows: Rows,
    **_: Any,
) -> Tensor:
    """Causal attention of each row to its own run: (B, T, heads, D) to the same shape."""
    out = torch.empty_like(query_BTHD)
    length, group = query_BTHD.shape[1], nheads // kvheads
    for row, (start, past) in enumerate(rows):
        keys_HSD = key_cache[start : start + past + length].transpose(0, 1)
        values_HSD = value_cache[start : start + past + length].transpose(0, 1)
        if length == 1:  # the heads that share keys become the query's positions: nothing is expanded
            query_HGD = query_BTHD[row, 0].view(kvheads, group, -1)
            heads = F.scaled_dot_product_attention(
                query_HGD[None], keys_HSD[None], values_HSD[None], scale=scale_factor
            )
            out[row, 0] = heads[0].reshape(nheads, -1)
            continue
        mask = None if past == 0 else _causal_mask(length, past, query_BTHD.device)
        heads = F.scaled_dot_product_attention(
            query_BTHD[row].transpose(0, 1)[None],
            keys_HSD.repeat_interleave(group, 0)[None],
            values_HSD.repeat_interleave(group, 0)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale_factor,
        )
        out[row] = heads[0].transpose(0, 1)
    return out


def _causal_mask(length: int, past: int, device: torch.device) -> Tensor:
    """(T, past + T), True where a new token may look."""
    query_T1 = torch.arange(past, past + length, device=device)[:, None]
    return torch.arange(past + length, device=device) <= query_T1


register_attention_op(ATTENTION, _store, _attend)


def _move(pixels: Tensor, like: Tensor) -> Tensor:
    """Pixels in the device and dtype of ``like``; to a GPU from pinned memory, while the CPU goes on."""
    if like.is_cuda and not pixels.is_cuda:
        pixels = pixels.pin_memory()
    return pixels.to(like.device, like.dtype, non_blocking=like.is_cuda)


def kv_bytes_per_token(model: SmolVLM | LlavaNext, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    text = model.config.text
    assert text.num_key_value_heads is not None and text.head_dim is not None
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize


def embed_prompt(model: SmolVLM | LlavaNext, sequence: Sequence, start: int, count: int) -> Tensor:
    """Embeddings (1, T, D) of prompt tokens ``start`` … ``start + count``, image features in their places."""
    device = model.text_model.base_model.dec_norm.weight.device
    ids = torch.tensor(sequence.tokens(start, start + count), device=device)
    hidden_1TD = model.text_model.base_model.embed(ids)[None]
    for picture in sequence.pictures:
        first, last = placeholders_between(picture, start, start + count)
        if first < last:
            places = torch.from_numpy(picture.positions[first:last] - start).to(device)
            features_MD = picture.features.reshape(-1, hidden_1TD.shape[-1])[first:last]
            hidden_1TD[0, places] = features_MD.to(hidden_1TD.dtype)
    return hidden_1TD


class ModelRunner:
    """A Backend that computes with the model as it is. ``kv_tokens`` positions of cache in the model's dtype, and
    ``spare`` more behind them that no sequence owns."""

    def __init__(
        self, model: SmolVLM | LlavaNext, kv_tokens: int, banned: SequenceOf[int] = (), *, spare: int = 0
    ) -> None:
        self.model: Any = model.eval()
        self.banned = tuple(banned)
        self.kv_tokens = kv_tokens // BLOCK * BLOCK
        text = model.config.text
        weight = model.text_model.base_model.dec_norm.weight
        self.kv_bytes_per_token = kv_bytes_per_token(model, weight.dtype)
        assert text.num_key_value_heads is not None and text.head_dim is not None
        shape = (self.kv_tokens + spare, text.num_key_value_heads, text.head_dim)
        try:
            self._cache = [
                tuple(torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
                for _ in range(text.num_hidden_layers)
            ]
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(
                f"There is no memory for {self.kv_tokens} tokens of keys and values; pass a smaller kv_bytes. ({error})"
            ) from error

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy keys and values within the cache."""
        for layer in self._cache:
            for tensor in layer:
                tensor[target : target + tokens] = tensor[source : source + tokens]

    @torch.inference_mode()
    def encode(self, picture: Picture, first: int, count: int) -> None:
        """Run tiles through tower and connector."""
        pixels_NCHW, mask_NHW = picture.resolve()
        weight = self.model.text_model.base_model.dec_norm.weight
        if isinstance(self.model, LlavaNext):
            model, size = self.model, mask_NHW
            tokens_NPD = model.encode_tiles(_move(pixels_NCHW[first : first + count], weight))
            picture.add(tokens_NPD, lambda parts: model.join_picture(torch.cat(parts), size))
            return
        tiles_1NCHW = _move(pixels_NCHW[first : first + count], weight)[None]
        mask_1NHW = None if mask_NHW is None else mask_NHW[None, first : first + count].to(weight.device)
        features_NTD = self.model.encode_images(tiles_1NCHW, mask_1NHW).features
        if len(features_NTD) != count:
            raise InputError(f"{count - len(features_NTD)} of {count} tiles of a picture are marked as padding.")
        picture.add(features_NTD, torch.cat)

    def feature_bytes(self, picture: Picture) -> int:
        """Bytes of a picture's features."""
        features: Tensor = picture.features
        return features.numel() * features.element_size()

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, start: int, count: int) -> Sampled | None:
        """Compute a chunk of a prompt; sample after its last token."""
        assert sequence.extent is not None
        hidden_1TD = embed_prompt(self.model, sequence, start, count)
        positions_1T = torch.arange(start, start + count, device=hidden_1TD.device)[None]
        hidden_1TD = self._forward(hidden_1TD, positions_1T, [(sequence.extent.start, start)])
        if start + count < len(sequence.prompt):
            return None
        return sample(self.model.text_model.logits(hidden_1TD[:, -1]), [sequence], self.banned)[0]

    @torch.inference_mode()
    def decode(self, sequences: SequenceOf[Sequence]) -> list[Sampled]:
        """One step for sequences at different positions."""
        base = self.model.text_model.base_model
        device = base.dec_norm.weight.device
        ids_B1 = torch.tensor([[s.output[-1]] for s in sequences], device=device)
        positions_B1 = torch.tensor([[s.computed] for s in sequences], device=device)
        rows = [(s.extent.start, s.computed) for s in sequences if s.extent is not None]
        hidden_B1D = self._forward(base.embed(ids_B1), positions_B1, rows)
        return sample(self.model.text_model.logits(hidden_B1D[:, -1]), sequences, self.banned)

    def _forward(self, hidden_BTD: Tensor, positions_BT: Tensor, rows: Rows) -> Tensor:
        result, _, _ = self.model.text_model.base_model(
            hidden_BTD,
            position_ids=positions_BT,
            past_key_value_states=self._cache,
            use_cache=True,
            attn_name=ATTENTION,
            rows=rows,
        )
        hidden: Tensor = result
        return hidden
