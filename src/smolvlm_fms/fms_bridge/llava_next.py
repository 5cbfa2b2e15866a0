"""LLaVA-Next's names in Hugging Face checkpoints, for the table in ``adapters``.

Three layouts have been released: with ``language_model.model.`` and ``vision_tower.vision_model.`` (the hub's own
checkpoints; every transformers reads them, so they are what is written here), with ``model.`` in front of everything
(in memory, and some fine-tunes), and without ``vision_model.`` (written by transformers from 5.20 or so on).
"""

from __future__ import annotations

from smolvlm_fms.fms_bridge.adapters import Family, llama_rules, siglip_rules

__all__ = ["LLAVA_NEXT"]


def _family() -> Family:
    tower = "vision_tower.vision_model"
    text, rope = llama_rules("text_model.base_model", "language_model.model")
    return Family(
        names={
            **siglip_rules("vision_tower", tower),
            # CLIP's own: the class token is a parameter of the embeddings; the norm's name is misspelt in checkpoints.
            "vision_tower.embeddings": f"{tower}.embeddings",
            "vision_tower.embeddings.pre_layernorm": f"{tower}.pre_layrnorm",
            "projector.linear_1": "multi_modal_projector.linear_1",
            "projector.linear_2": "multi_modal_projector.linear_2",
            "image_newline": "image_newline",
            **text,
            "text_model.head": "language_model.lm_head",
        },
        rope=rope,
        aliases=(
            (r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
            (r"^vision_tower\.(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", f"{tower}."),
            (r"^(?:model\.)?language_model\.(?!model\.|lm_head\.)", "language_model.model."),
            (r"^model\.language_model\.", "language_model."),
            (r"^lm_head\.", "language_model.lm_head."),
        ),
        dropped=(
            r"rotary_emb\.inv_freq$",
            r"embeddings\.position_ids$",
            # SigLIP's pooling head; LLaVA-Next reads hidden states below it.
            r"^(?:model\.)?vision_tower\.(?:vision_model\.)?head\.",
        ),
    )


LLAVA_NEXT: Family = _family()
"""Granite-vision and LLaVA-1.6, with a SigLIP or a CLIP tower."""
