"""State-dict steps between Hugging Face checkpoints and this package's modules: pure, idempotent, one table a family.

    checkpoint ─▶ aliases ─▶ rope ─▶ names ─▶ fusion ─▶ tied head ─▶ our modules
    our modules ─▶ split ─▶ rope⁻¹ ─▶ names⁻¹ ─▶ checkpoint                          (to_hf)

A tensor's *name* says how it is laid out: ``q_proj`` holds Hugging Face's rotary order (first halves, then second
halves), ``in_proj.query`` FMS's (pairs). The step that reorders the rows also renames, so running any step twice
changes nothing, and both directions move whole rows, so a round trip gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.errors import CheckpointError

__all__ = [
    "FAMILIES",
    "SOURCES",
    "STEPS",
    "Family",
    "canonical_name",
    "from_source",
    "group_of",
    "head_names",
    "llama_rules",
    "rename",
    "siglip_rules",
    "split",
    "to_hf",
]

StateDict = Mapping[str, Tensor]
Rules = dict[str, str]
"""Module paths, ours to Hugging Face's; ``{}`` stands for a layer number."""

FUSED = {
    "attn.in_proj.qkv_fused": ("attn.in_proj.query", "attn.in_proj.key", "attn.in_proj.value"),
    "ff_sub_layer.wg1_fused": ("ff_sub_layer.wg", "ff_sub_layer.w1"),
}
"""FMS's fused linears and the linears that they hold, in order."""

GPTQ_LEAVES = ("qweight", "qzeros", "scales", "g_idx")

HEAD, EMBEDDING = "text_model.head.weight", "text_model.base_model.embedding.weight"

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """How the tensors of one architecture are named and laid out.

    names: modules that are only renamed. rope: query and key projections whose rows also change order.
    aliases: patterns and replacements that turn older releases' names into today's. dropped: patterns of tensors that
    some releases carry and nobody needs (buffers that are computed).
    """

    names: Rules
    rope: Rules
    aliases: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")
    inverse: Rules = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse", {theirs: ours for ours, theirs in (self.names | self.rope).items()})

    def ours(self, name: str) -> str | None:
        """Our (unfused) name of a Hugging Face tensor; None for one that the architecture does not have."""
        return rename(self.inverse, name)

    def theirs(self, name: str) -> str | None:
        """The Hugging Face name of one of our (unfused) tensors; None for one that the architecture does not have."""
        return rename(self.names, name) or rename(self.rope, name)


def siglip_rules(ours: str, theirs: str) -> Rules:
    """Names in a SigLIP tower. Its attention has no rotary positions, so its q and k are only renamed."""
    layer = {
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "attn.in_proj.query": "self_attn.q_proj",
        "attn.in_proj.key": "self_attn.k_proj",
        "attn.in_proj.value": "self_attn.v_proj",
        "attn.dense": "self_attn.out_proj",
        "mlp.w1": "mlp.fc1",
        "mlp.w2": "mlp.fc2",
    }
    names = ("embeddings.patch_embedding", "embeddings.position_embedding", "post_layernorm")
    return {f"{ours}.{n}": f"{theirs}.{n}" for n in names} | {
        f"{ours}.layers.{{}}.{a}": f"{theirs}.encoder.layers.{{}}.{b}" for a, b in layer.items()
    }


def llama_rules(ours: str, theirs: str) -> tuple[Rules, Rules]:
    """Names in a Llama, Mistral or Granite backbone, and separately its rotary projections."""
    layer = {
        "ln": "input_layernorm",
        "ff_ln": "post_attention_layernorm",
        "attn.in_proj.value": "self_attn.v_proj",
        "attn.dense": "self_attn.o_proj",
        "ff_sub_layer.wg": "mlp.gate_proj",
        "ff_sub_layer.w1": "mlp.up_proj",
        "ff_sub_layer.w2": "mlp.down_proj",
    }
    rope = {"attn.in_proj.query": "self_attn.q_proj", "attn.in_proj.key": "self_attn.k_proj"}

    def layers(pairs: Rules) -> Rules:
        return {f"{ours}.layers.{{}}.{a}": f"{theirs}.layers.{{}}.{b}" for a, b in pairs.items()}

    return {f"{ours}.embedding": f"{theirs}.embed_tokens", f"{ours}.dec_norm": f"{theirs}.norm"} | layers(layer), (
        layers(rope)
    )


def _smolvlm() -> Family:
    text, rope = llama_rules("text_model.base_model", "model.text_model")
    return Family(
        names={
            **siglip_rules("vision_tower", "model.vision_model"),
            "connector.proj": "model.connector.modality_projection.proj",
            **text,
            "text_model.head": "lm_head",
        },
        rope=rope,
        # Headless models are saved without "model."; the first training code wrapped the backbone once more.
        aliases=(
            (r"^(?:model\.)?vision_model\.", "model.vision_model."),
            (r"^(?:model\.)?connector\.modality_projection\.", "model.connector.modality_projection."),
            (r"^(?:model\.)?text_model\.(?!base_model\.|head\.)(?:model\.)?", "model.text_model."),
            (r"^(?:model\.)?text_model\.lm_head\.", "lm_head."),
        ),
    )


FAMILIES: dict[str, Family] = {"smolvlm": _smolvlm()}
"""Architectures by the name under which they are registered with FMS."""


def canonical_name(family: Family, name: str) -> str | None:
    """A checkpoint tensor's name as current releases write it; None for a tensor that is dropped."""
    if any(re.search(pattern, name) for pattern in family.dropped):
        return None
    for pattern, replacement in family.aliases:
        name = re.sub(pattern, replacement, name)
    return name


def head_names(family: Family, source: str) -> tuple[str, str]:
    """Names of the language-model head's and the embedding's weights in a checkpoint of format ``source``."""
    if source == "fms":
        return HEAD, EMBEDDING
    head, embedding = family.theirs(HEAD), family.theirs(EMBEDDING)
    assert head is not None and embedding is not None
    return head, embedding


def group_of(name: str) -> str:
    """The part of ``name`` up to its layer number; tensors that a step needs together share it."""
    found = _NUMBER.search(name)
    return name[: found.end()] if found else ""


def rename(rules: Rules, name: str) -> str | None:
    """``name`` under ``rules``, or None where no rule covers its module (or, outside any module, itself)."""
    if "." not in name:
        return rules.get(name)
    module, _, leaf = name.rpartition(".")
    found = _NUMBER.search(module)
    if found is None:
        target = rules.get(module)
        return None if target is None else f"{target}.{leaf}"
    target = rules.get(f"{module[: found.start()]}.{{}}.{module[found.end() :]}")
    return None if target is None else f"{target.format(found.group(1))}.{leaf}"


def _head_dim(config: Any) -> int:
    return int(config.text.head_dim)


def _reorder(name: str, tensor: Tensor, head_dim: int, *, pairs: bool) -> Tensor:
    """Rows of every head from halves to pairs (``pairs``) or back. GPTQ keeps the output along the last axis."""
    leaf = name.rpartition(".")[2]
    if leaf == "g_idx" or tensor.dim() == 0:
        return tensor
    if leaf == "qzeros":
        # Packed eight outputs to an integer. Reordering those means unpacking; symmetric checkpoints have one value.
        if not tensor.is_meta and not bool((tensor == tensor.flatten()[0]).all()):
            raise CheckpointError(f"{name}: asymmetric GPTQ zero points cannot be put into FMS's rotary order.")
        return tensor
    axis = tensor.dim() - 1 if leaf in ("qweight", "scales") and tensor.dim() == 2 else 0
    split = (2, head_dim // 2) if pairs else (head_dim // 2, 2)
    shape = tensor.shape
    blocks = tensor.reshape(*shape[:axis], -1, *split, *shape[axis + 1 :])
    return blocks.transpose(axis + 1, axis + 2).reshape(shape)


Step = Callable[..., StateDict]


def aliases_step(family: Family) -> Step:
    """Older names to today's; computed buffers are dropped."""

    def step(state: StateDict, **_: Any) -> StateDict:
        named = ((canonical_name(family, name), tensor) for name, tensor in state.items())
        return {name: tensor for name, tensor in named if name is not None}

    return step


def rope_step(family: Family) -> Step:
    """Query and key projections from halves to pairs, under FMS's names."""
    inverse = {theirs: ours for ours, theirs in family.rope.items()}

    def step(state: StateDict, model_config: Any = None, **_: Any) -> StateDict:
        result = {}
        for name, tensor in state.items():
            target = rename(inverse, name)
            if target is not None:
                tensor = _reorder(name, tensor, _head_dim(model_config), pairs=True)
            result[target or name] = tensor
        return result

    return step


def names_step(family: Family) -> Step:
    """Every other module's name."""
    inverse = {theirs: ours for ours, theirs in family.names.items()}

    def step(state: StateDict, **_: Any) -> StateDict:
        return {rename(inverse, name) or name: tensor for name, tensor in state.items()}

    return step


def fusion_step(_: Family) -> Step:
    """Linears fused or split, as the model's ``fused_weights`` has it."""

    def step(state: StateDict, model_config: Any = None, **_: Any) -> StateDict:
        return fuse(state) if model_config is None or model_config.fused_weights else split(state, model_config)

    return step


def tied_head_step(_: Family) -> Step:
    """One tensor for head and embedding where the configuration ties them, whichever of the two is there."""

    def step(state: StateDict, model_config: Any = None, **_: Any) -> StateDict:
        if model_config is None or not model_config.tie_word_embeddings or HEAD not in state:
            return state
        result = dict(state)
        head = result.pop(HEAD)
        if not torch.equal(result.setdefault(EMBEDDING, head), head):
            raise CheckpointError(
                "The configuration ties lm_head to the embeddings (tie_word_embeddings), but the checkpoint holds two "
                "different tensors. Pass tie_word_embeddings=False to use both."
            )
        return result

    return step


def check_step(family: Family) -> Step:
    """Refuse tensors that no module of the architecture has; FMS would only log them."""

    def step(state: StateDict, **_: Any) -> StateDict:
        unknown = sorted(name for name in state if not _is_ours(family, name))
        if unknown:
            raise CheckpointError(
                f"The checkpoint holds {len(unknown)} unexpected: {', '.join(unknown[:5])}"
                f"{' …' if len(unknown) > 5 else ''}. Is it another model's, or is the source (hf, fms) wrong?"
            )
        return state

    return step


STEPS: dict[str, Callable[[Family], Step]] = {
    "aliases": aliases_step,
    "rope": rope_step,
    "names": names_step,
    "weight_fusion": fusion_step,
    "tied_head": tied_head_step,
    "check": check_step,
}
"""Steps by name, in the order in which a Hugging Face checkpoint runs through them."""

SOURCES: dict[str, tuple[str, ...]] = {
    "hf": tuple(STEPS),
    "fms": ("weight_fusion", "tied_head", "check"),
}
"""Checkpoint formats and the steps that each needs."""


def from_source(family: Family, source: str, state: StateDict, config: Any) -> StateDict:
    """``state`` in format ``source`` as our modules want it. ``state`` holds whole groups (see ``group_of``)."""
    for name in SOURCES[source]:
        state = STEPS[name](family)(state, model_config=config)
    return state


def to_hf(family: Family, state: StateDict, config: Any) -> dict[str, Tensor]:
    """The inverse of the ``hf`` source: our tensors, fused or not, under today's Hugging Face names and layout.

    Tensors that only change their name or are parts of a fused one share memory with ``state``. A tied head is left
    out. Works on meta tensors, so it also says what a checkpoint has to hold.
    """
    result = {}
    for name, tensor in split(state, config).items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        target = rename(family.rope, name)
        if target is not None:
            tensor = _reorder(target, tensor, _head_dim(config), pairs=False)
        target = target or rename(family.names, name)
        if target is None:
            raise CheckpointError(f"{name} has no name in Hugging Face's checkpoints of this architecture.")
        result[target] = tensor
    return result


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts, one below the other. torch.cat of tensors without memory would import half of torch's compiler."""
    if parts[0].is_meta:
        return parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    return torch.cat(parts)


def fuse(state: StateDict) -> dict[str, Tensor]:
    """Join the linears that FMS fuses, where all of them are there."""
    result = dict(state)
    for name in state:
        for whole, parts in FUSED.items():
            stem, found, leaf = name.rpartition(f".{parts[0]}.")
            names = [f"{stem}.{part}.{leaf}" for part in parts]
            if found and leaf in GPTQ_LEAVES:
                raise CheckpointError(f"{name}: GPTQ linears cannot be fused; pass fused_weights=False.")
            if found and all(n in result for n in names):
                result[f"{stem}.{whole}.{leaf}"] = _joined([result.pop(n) for n in names])
    return result


def split(state: StateDict, config: Any) -> dict[str, Tensor]:
    """Take fused linears apart, as views."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for whole, parts in FUSED.items():
            stem, found, leaf = name.rpartition(f".{whole}.")
            if found:
                sizes: list[int] = _sizes(whole, name, tensor, config)
                if sum(sizes) != tensor.shape[0]:
                    raise CheckpointError(f"{name} has {tensor.shape[0]} rows, which cannot be divided into {parts}.")
                result |= {f"{stem}.{p}.{leaf}": t for p, t in zip(parts, torch.split(tensor, sizes), strict=True)}
                break
        else:
            result[name] = tensor
    return result


def _sizes(whole: str, name: str, tensor: Tensor, config: Any) -> list[int]:
    parts = len(FUSED[whole])
    if parts == 3 and name.startswith("text_model."):
        text = config.text
        heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
        return [tensor.shape[0] * h // sum(heads) for h in heads]
    return [tensor.shape[0] // parts] * parts


def _is_ours(family: Family, name: str) -> bool:
    for whole, parts in FUSED.items():
        name = name.replace(f".{whole}.", f".{parts[0]}.")
    return family.theirs(name) is not None
