"""The text backbone: Llama's or Granite's blocks on FMS's modules, taking token ids or embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from fms.modules.attention import MultiHeadAttention
from fms.modules.feedforward import GatedLinearUnit
from fms.modules.head import LinearClassificationHead
from fms.modules.layernorm import LayerNormParameterized
from torch import Tensor, nn

from smolvlm_fms.config import TextConfig
from smolvlm_fms.errors import InputError
from smolvlm_fms.modules.attention import CACHED, PLAIN
from smolvlm_fms.modules.rotary import Rotary
from smolvlm_fms.modules.text_block import TextBlock, rms_norm

__all__ = ["KVCache", "TextBackbone", "TextModel"]

KVCache = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values (B, kv_heads, T, head_dim)."""


class TextBackbone(nn.Module):
    """Token ids (B, T) or embeddings (B, T, D) to hidden states (B, T, D), with an optional KV cache."""

    def __init__(
        self,
        config: TextConfig,
        *,
        fused_weights: bool = True,
        linear_config: dict[str, Any] | None = None,
        distributed_strategy: DistributedStrategy = NoOpStrategy,
        embedding_only: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        # Uninitialised, see SiglipEmbeddings.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        self.embedding_only = embedding_only
        if embedding_only:
            return
        self.rope_length = config.max_position_embeddings
        self.rot_emb = Rotary(
            dim=config.head_dim,
            ratio=config.rope_theta,
            max_seq_len=config.max_position_embeddings,
            scaling=config.rope_scaling or {},
        )
        self.layers = nn.ModuleList(
            distributed_strategy.distribute_layer(TextBlock(config, self.rot_emb, fused_weights, linear_config), i)
            for i in range(config.num_hidden_layers)
        )
        self.dec_norm = distributed_strategy.distribute_module(rms_norm(config), final_layers=True)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T), int64, to embeddings (B, T, D), before any embedding multiplier."""
        embeddings_BTD: Tensor = self.embedding(input_ids)
        return embeddings_BTD

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor | None = None,
        past_key_value_states: KVCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        **attn_kwargs: Any,
    ) -> tuple[Tensor, KVCache, tuple[Tensor, ...]]:
        """Return normed hidden states (B, T, D), the extended cache (empty unless ``use_cache``) and, when asked for,
        L + 1 hidden states in transformers' convention (embeddings, each block's output, the last one normed).

        ``inputs`` holds ids (B, T), int64, or embeddings (B, T, D). ``position_ids`` (B, T), int64.
        """
        if self.embedding_only:
            raise InputError("This model was built with vision_only=True; it has no text backbone to run.")
        hidden_BTD = inputs if inputs.is_floating_point() else self.embed(inputs)
        # Granite scales whatever enters the first block, image features among it.
        if self.config.embedding_multiplier != 1.0:
            hidden_BTD = hidden_BTD * self.config.embedding_multiplier
        past: Sequence[tuple[Tensor, Tensor] | None] = past_key_value_states or [None] * len(self.layers)
        # An attention operator of someone else's may keep its state in another form; it calls reach() itself.
        cached = past[0][0].shape[2] if past[0] is not None and isinstance(past[0][0], Tensor) else 0
        self.reach(cached + hidden_BTD.shape[1])
        cache: KVCache = []
        states = [hidden_BTD]
        attn_kwargs.setdefault("attn_name", CACHED if use_cache else PLAIN)
        for layer, layer_past in zip(self.layers, past, strict=True):
            arguments = {
                "position_ids": position_ids,
                "past_key_value_state": layer_past,
                "use_cache": use_cache,
                **attn_kwargs,
            }
            if self.gradient_checkpointing and self.training and not use_cache:
                hidden_BTD = torch.utils.checkpoint.checkpoint(layer, hidden_BTD, use_reentrant=False, **arguments)
            elif use_cache:
                hidden_BTD, layer_cache = layer(hidden_BTD, **arguments)
                cache.append(layer_cache)
            else:
                hidden_BTD = layer(hidden_BTD, **arguments)
            states.append(hidden_BTD)
        hidden_BTD = self.dec_norm(hidden_BTD)
        states[-1] = hidden_BTD
        return hidden_BTD, cache, tuple(states) if output_hidden_states else ()

    def reach(self, total: int) -> None:
        """Make the RoPE tables cover ``total`` positions."""
        if total > self.rope_length and not torch.compiler.is_compiling():
            self.prepare_rope(2 * total)

    def prepare_rope(self, length: int = 0) -> None:
        """Compute the RoPE tables on the devices where the parameters are. FMS keeps them outside the state dict.

        They reach over ``length`` positions, and at least over those that the configuration names. Texts may be
        longer, as in transformers; FMS's own tables do not grow.
        """
        if self.embedding_only:
            return
        self.rope_length = max(length, self.config.max_position_embeddings)
        for store in (self.rot_emb.cached_freqs, self.rot_emb.max_seq_len_cached):
            store.clear()
        for device in {p.device for p in self.parameters() if p.device.type != "meta"}:
            self.rot_emb.compute_freqs_cis(device, self.rope_length)

    def reset_parameters(self) -> None:
        """Initialise as FMS's Llama does: truncated normal weights, unit norms."""
        nn.init.trunc_normal_(self.embedding.weight, std=self.config.hidden_size**-0.5)
        for module in self.modules():
            if isinstance(module, MultiHeadAttention | GatedLinearUnit | LayerNormParameterized):
                module.reset_parameters()
        self.prepare_rope()


class TextModel(nn.Module):
    """Backbone plus language-model head.

    scale_logits: divide the logits by Granite's ``logits_scaling``, as transformers' ``GraniteForCausalLM`` does and
    its vision-language models, which put a head of their own on the bare backbone, do not.
    """

    def __init__(self, config: TextConfig, *, tied: bool = False, scale_logits: bool = True, **backbone: Any) -> None:
        super().__init__()
        self.config = config
        self.tied = tied
        self.logits_divisor = config.logits_scaling if scale_logits else 1.0
        self.base_model = TextBackbone(config, **backbone)
        if self.base_model.embedding_only:
            return
        self.head = LinearClassificationHead(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let head and embedding share one tensor, where the configuration says so: the one that has values."""
        if not self.tied or self.base_model.embedding_only:
            return
        if self.base_model.embedding.weight.is_meta and not self.head.weight.is_meta:
            self.base_model.embedding.weight = self.head.weight
        self.head.weight = self.base_model.embedding.weight

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states (…, D) to logits (…, V), in the head's dtype."""
        logits: Tensor = self.head(hidden_BTD)
        return logits if self.logits_divisor == 1.0 else logits / self.logits_divisor

    def reset_parameters(self) -> None:
        self.base_model.reset_parameters()
        if not self.tied and not self.base_model.embedding_only:
            nn.init.trunc_normal_(self.head.weight, std=self.config.hidden_size**-0.5)
