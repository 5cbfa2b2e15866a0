"""Looking at held-out samples during a run: the loss, what the model really says, and how often that is right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smolvlm_fms.model.packed import PACKED, cuts
from smolvlm_fms.training.config import EvalConfig
from smolvlm_fms.training.loss import shifted_targets, token_loss
from smolvlm_fms.training.samples import IGNORE, Sample, collate, to_device

__all__ = ["Evaluator", "greedy", "model_inputs"]


def model_inputs(batch: dict[str, Tensor], masked: bool = False) -> dict[str, Any]:
    """The arguments of ``forward`` in a batch.

    Rows with one sample need no mask (padding is on the right). The samples of packed rows are kept apart by an
    attention operator that takes one after the other, or, ``masked``, by a mask, which ``torch.compile`` and GPUs like
    better.
    """
    names = ("input_ids", "pixel_values", "pixel_attention_mask", "image_sizes", "position_ids")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    if "position_ids" not in batch:
        return inputs
    segments_BT = batch["segments"]
    if not masked:
        return inputs | {"attn_name": PACKED, "cuts": cuts(segments_BT)}
    places = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    return inputs | {"mask": (segments_BT[:, :, None] == segments_BT[:, None, :]) & (places[:, None] >= places)}


class Evaluator:
    """Callable for ``Trainer(evaluate=…)``: ``evaluator(model, step)`` returns metrics and generations.

    samples: held-out conversations; the loss looks at the first ``loss_samples``, generations (and exact match) at the
    first ``generations``. decode: token ids to text, control tokens left out. stop: ids that end an answer.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        decode: Callable[[list[int]], str],
        stop: Collection[int],
        pad_token_id: int,
        config: EvalConfig | None = None,
        batch_size: int = 8,
    ) -> None:
        self.samples = samples
        self.decode = decode
        self.stop = frozenset(stop)
        self.pad_token_id = pad_token_id
        self.config = config or EvalConfig()
        self.batch_size = batch_size

    def __call__(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Return ``eval_loss``, ``exact_match`` and ``generations`` (prompt, wanted, said)."""
        result: dict[str, Any] = {}
        if self.config.loss_samples and self.samples:
            result["eval_loss"] = self.loss(model)
        shown = [self._generation(model, sample) for sample in self.samples[: self.config.generations]]
        if shown:
            result["exact_match"] = sum(one["said"] == one["wanted"] for one in shown) / len(shown)
            result["generations"] = shown
        return result

    def loss(self, model: nn.Module) -> float:
        """Mean cross entropy a target token."""
        device = next(model.parameters()).device
        samples = self.samples[: self.config.loss_samples]
        entropy, count = 0.0, 0
        for start in range(0, len(samples), self.batch_size):
            batch = to_device(collate(samples[start : start + self.batch_size], self.pad_token_id), device)
            targets_BT = shifted_targets(batch["labels"])
            mask_BT = targets_BT != IGNORE
            logits_KV = model(**model_inputs(batch), logits_mask=mask_BT)
            entropy += float(token_loss(logits_KV, targets_BT[mask_BT])[1])
            count += int(mask_BT.sum())
        return entropy / max(1, count)

    def _generation(self, model: nn.Module, sample: Sample) -> dict[str, str]:
        """The first answer of a sample: what was asked, what should be said, what the model says."""
        learnt = (sample.labels != IGNORE).nonzero().flatten().tolist()
        first = learnt[0] if learnt else sample.length
        wanted: list[int] = []
        for place in range(first, sample.length):
            if int(sample.labels[place]) == IGNORE or int(sample.input_ids[place]) in self.stop:
                break
            wanted.append(int(sample.input_ids[place]))
        said = greedy(model, sample, first, self.config.max_new_tokens, self.stop)
        return {
            "prompt": self.decode(sample.input_ids[:first].tolist()).strip(),
            "wanted": self.decode(wanted).strip(),
            "said": self.decode(said).strip(),
        }


@torch.no_grad()
def greedy(model: nn.Module, sample: Sample, length: int, max_new_tokens: int, stop: Collection[int]) -> list[int]:
    """The most likely continuation of the first ``length`` tokens of a sample, up to a stop token (left out)."""
    device = next(model.parameters()).device
    cut = replace(sample, input_ids=sample.input_ids[:length], labels=sample.labels[:length])
    inputs: dict[str, Any] = model_inputs(to_device(collate([cut], 0), device))
    said: list[int] = []
    while True:
        logits_11V, cache = model(**inputs, use_cache=True, last_n_tokens=1)
        token = int(logits_11V[0, -1].argmax())
        if token in stop:
            return said
        said.append(token)
        if len(said) == max_new_tokens:
            return said
        inputs = {"input_ids": torch.tensor([[token]], device=device), "past_key_value_states": cache}
