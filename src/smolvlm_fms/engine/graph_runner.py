"""The accelerator path: prefill as on the exact path, decode in static shapes, each shape a CUDA graph.

A decode step of a small model is hundreds of kernels of a few microseconds each, and launching them one by one takes
longer than running them. Here the step's batch and the stretch of cache that it looks at are rounded up to powers of
two; every such shape is captured once as a graph and replayed from then on. Rows that only fill a batch up write to a
spare block behind the cache. On devices without CUDA graphs the same step runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from fms.modules.attention import register_attention_op
from torch import Tensor

from smolvlm_fms.engine.config import BLOCK
from smolvlm_fms.engine.runner import ModelRunner
from smolvlm_fms.engine.sampler import sample
from smolvlm_fms.engine.sequence import Sampled, Sequence
from smolvlm_fms.model.llava_next import LlavaNext
from smolvlm_fms.model.smolvlm import SmolVLM

__all__ = ["GraphRunner", "bucket"]

ATTENTION = "smolvlm_static"
SHORTEST_REACH = 256
"""Fewer cached tokens than these are not worth a graph of their own."""


def bucket(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``least``."""
    return max(least, 1 << (count - 1).bit_length())


def _store(
    keys_B1HD: Tensor, values_B1HD: Tensor, key_cache: Tensor, value_cache: Tensor, *, places_B: Tensor, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write each row's new key and value to its place."""
    key_cache.index_copy_(0, places_B, keys_B1HD[:, 0])
    value_cache.index_copy_(0, places_B, values_B1HD[:, 0])
    return key_cache, value_cache, key_cache, value_cache


def _attend(
    query_B1HD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    nheads: int,
    kvheads: int,
    p_dropout: float,
    scale_factor: float | None,
    *,
    span_BS: Tensor,
    seen_B11S: Tensor,
    **_: Any,
) -> Tensor:
    """Attention of one query a row to its own run of the cache: (B, 1, heads, D) to the same shape."""
    batch = query_B1HD.shape[0]
    keys_BKSD, values_BKSD = (cache[span_BS].transpose(1, 2) for cache in (key_cache, value_cache))
    # The heads that share keys become the query's positions: nothing is expanded.
    query_BKGD = query_B1HD.view(batch, kvheads, nheads // kvheads, -1)
    heads = F.scaled_dot_product_attention(query_BKGD, keys_BKSD, values_BKSD, attn_mask=seen_B11S, scale=scale_factor)
    return heads.reshape(query_B1HD.shape)


register_attention_op(ATTENTION, _store, _attend)


class GraphRunner(ModelRunner):
    """A Backend for GPUs. ``compile_step``: compile the decode step with torch's compiler (``backend`` names which)
    before it is captured: some ten seconds a shape, for fewer and larger kernels."""

    def __init__(
        self,
        model: SmolVLM | LlavaNext,
        kv_tokens: int,
        banned: SequenceOf[int] = (),
        *,
        compile_step: bool = False,
        backend: str = "inductor",
    ) -> None:
        super().__init__(model, kv_tokens, banned, spare=BLOCK)
        self._steps: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {}
        self._pool: Any = None
        self._compiles = compile_step
        self._compute: Callable[[Tensor, int], Tensor] = self._logits
        if compile_step:
            self._compute = torch.compile(self._logits, fullgraph=True, dynamic=False, backend=backend)

    @torch.inference_mode()
    def decode(self, sequences: SequenceOf[Sequence]) -> list[Sampled]:
        """One step for sequences at different positions."""
        batch = bucket(len(sequences))
        reach = bucket(max(s.computed for s in sequences) + 1, SHORTEST_REACH)
        device = self.model.text_model.base_model.dec_norm.weight.device
        table = self._idle(batch)
        for row, s in enumerate(sequences):
            assert s.extent is not None
            table[:, row] = torch.tensor((s.output[-1], s.computed, s.extent.start))
        if (batch, reach) not in self._steps:
            self._steps[batch, reach] = self._prepare(batch, reach, device)
        logits_BV = self._steps[batch, reach](table)[: len(sequences)]
        return sample(logits_BV, sequences, self.banned)

    def _idle(self, batch: int) -> Tensor:
        """Token, position and start (3, B) of rows that write to the spare block and are read by nobody."""
        table = torch.zeros(3, batch, dtype=torch.long, pin_memory=torch.cuda.is_available())
        table[2] = self.kv_tokens
        return table

    def _prepare(self, batch: int, reach: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What computes logits from a table of this shape: a graph where the device has them."""
        inputs_3B = self._idle(batch).to(device)
        # One compilation a shape is what is wanted here; torch takes more than a few for a mistake.
        with torch._dynamo.config.patch(recompile_limit=256) if self._compiles else nullcontext():
            self._compute(inputs_3B, reach)
        if device.type != "cuda":
            return lambda table: self._compute(table.to(device), reach)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # first runs choose algorithms and allocate workspaces, which a graph may not
            self._compute(inputs_3B, reach)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BV = self._compute(inputs_3B, reach)
        self._pool = self._pool or graph.pool()  # graphs run one after another and may share their workspace

        def replay(table: Tensor) -> Tensor:
            inputs_3B.copy_(table, non_blocking=True)
            graph.replay()
            return logits_BV

        return replay

    def _logits(self, table_3B: Tensor, reach: int) -> Tensor:
        """Logits (B, V) after one token a row; every shape depends on B and ``reach`` alone."""
        ids_B, positions_B, starts_B = table_3B
        steps_S = torch.arange(reach, device=table_3B.device)
        seen_BS = steps_S <= positions_B[:, None]
        # What a row may not see is read from its own beginning, never from memory that may hold NaN: 0 · NaN is NaN.
        span_BS = starts_B[:, None] + torch.where(seen_BS, steps_S, 0)
        base = self.model.text_model.base_model
        hidden_B1D, _, _ = base(
            base.embed(ids_B[:, None]),
            position_ids=positions_B[:, None],
            past_key_value_states=self._cache,
            use_cache=True,
            attn_name=ATTENTION,
            places_B=starts_B + positions_B,
            span_BS=span_BS,
            seen_B11S=seen_BS[:, None, None],
        )
        logits_BV: Tensor = self.model.text_model.logits(hidden_B1D[:, -1])
        return logits_BV
