"""A decoder block of the text backbones on FMS's modules: Llama's, and with two multipliers Granite's.

FMS's own LLaMABlock and GraniteBlock compute the same, but they live in ``fms.models``, whose import brings
``torch.distributed.fsdp`` and sympy along: 0.6 s of every process's start, for nothing that inference uses.
"""

from __future__ import annotations

from typing import Any

from fms.modules.attention import MultiHeadAttention
from fms.modules.feedforward import GatedLinearUnit
from fms.modules.layernorm import LayerNormParameterized
from fms.modules.positions import RotaryEmbedding
from fms.utils.activation import str_to_activation
from torch import Tensor, nn

from smolvlm_fms.config import TextConfig
from smolvlm_fms.modules.vision import grow_factor

__all__ = ["TextBlock", "rms_norm"]


def rms_norm(config: TextConfig) -> LayerNormParameterized:
    """RMSNorm over ``hidden_size``, its mean in fp32."""
    return LayerNormParameterized(config.hidden_size, eps=config.rms_norm_eps, use_high_precision_pow=True)


class TextBlock(nn.Module):
    """Pre-norm block: hidden states (B, T, D) to the same shape. Its parts carry the names that FMS's blocks give them.

    residual_multiplier scales what attention and MLP add to the stream, attention_multiplier the scores (Granite).
    """

    def __init__(
        self, config: TextConfig, rotary: RotaryEmbedding, fused: bool, linear_config: dict[str, Any] | None
    ) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.ln = rms_norm(config)
        self.ff_ln = rms_norm(config)
        self.attn = MultiHeadAttention(
            config.hidden_size,
            config.head_dim,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            p_dropout=config.attention_dropout,
            use_bias=config.attention_bias,
            position_encoder=rotary,
            fused=fused,
            linear_config=linear_config,
            scale_factor=config.attention_scale,
        )
        self.ff_sub_layer = GatedLinearUnit(
            config.hidden_size,
            hidden_grow_factor=grow_factor(config.hidden_size, config.intermediate_size),
            multiple_of=1,
            activation_fn=str_to_activation(config.hidden_act),
            p_dropout=config.attention_dropout,
            use_bias=config.mlp_bias,
            fused=fused,
            linear_config=linear_config,
        )
        self.dropout = nn.Dropout(config.attention_dropout) if config.attention_dropout else nn.Identity()

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        position_ids: Tensor | None = None,
        past_key_value_state: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
        **attn_kwargs: Any,
    ) -> Any:
        """Hidden states; with ``use_cache`` (hidden states, this layer's keys and values)."""
        attended = self.attn(
            self.ln(hidden_BTD),
            position_ids=position_ids,
            past_key_value_state=past_key_value_state,
            use_cache=use_cache,
            **attn_kwargs,
        )
        attended_BTD, cache = attended if use_cache else (attended, None)
        hidden_BTD = self._add(hidden_BTD, attended_BTD)
        hidden_BTD = self._add(hidden_BTD, self.ff_sub_layer(self.ff_ln(hidden_BTD)))
        return (hidden_BTD, cache) if use_cache else hidden_BTD

    def _add(self, stream_BTD: Tensor, change_BTD: Tensor) -> Tensor:
        change_BTD = self.dropout(change_BTD)
        if self.residual_multiplier != 1.0:
            change_BTD = change_BTD * self.residual_multiplier
        return change_BTD + stream_BTD
