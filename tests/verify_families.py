"""Tiny random checkpoints, complete with processors' files, of every family that ``smolvlm verify`` covers.

    folder = FAMILIES["SmolVLM2 (pictures and video)"](tmp_path)

``scripts/parity-table`` writes docs/parity.md from them; tests/parity/test_verify.py checks each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.tiny import build_processor_files, build_tokenizer, token_ids
from tests.tiny_llava import build_llava
from tests.tiny_models import VOCAB, build_checkpoint

__all__ = ["FAMILIES", "full_shape"]

DOCLING_TOKENS = ("<doctag>", "</doctag>", "<otsl>", "<loc_0>", "<loc_500>")
TILE = 30
PINPOINTS = [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]]


def smolvlm2(folder: Path) -> Path:
    return build_checkpoint(folder, "smolvlm", processor=True)


def idefics3(folder: Path) -> Path:
    return build_checkpoint(folder, "idefics3", processor=True)


def large_tower(folder: Path) -> Path:
    return build_checkpoint(folder, "grid27", processor=True)


def llama3(folder: Path) -> Path:
    return build_checkpoint(folder, "llama3_rope", processor=True)


def granite_docling(folder: Path) -> Path:
    """Idefics3 with one tensor for embeddings and head, and a tokenizer with Docling's markup."""
    vocabulary = VOCAB + len(DOCLING_TOKENS)
    build_checkpoint(folder, "tied", text={"vocab_size": vocabulary})
    return build_processor_files(
        folder, model_type="idefics3", tile=32, longest_edge=128, image_seq_len=4, extra_tokens=DOCLING_TOKENS
    )


def granite_vision(folder: Path) -> Path:
    return _llava(folder, "granite")


def llava_mistral(folder: Path) -> Path:
    return _llava(folder, "mistral")


def _llava(folder: Path, family: str) -> Path:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from smolvlm_fms.processing.llava_next import LlavaNextProcessor

    build_llava(build_tokenizer(folder, padding_side="left"), family)
    size = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    LlavaNextImageProcessorPil(**size, image_grid_pinpoints=PINPOINTS).save_pretrained(folder)
    LlavaNextProcessor.from_pretrained(folder).save_pretrained(folder)  # transformers does not look into config.json
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "SmolVLM2 (pictures, video)": smolvlm2,
    "SmolVLM, SmolDocling (Idefics3 classes)": idefics3,
    "granite-docling (tied head, markup tokens)": granite_docling,
    "SmolVLM 2.2B (tower of 27 × 27 patches)": large_tower,
    "Idefics3 with Llama 3 (scaled RoPE)": llama3,
    "LLaVA-Next: SigLIP and Granite": granite_vision,
    "LLaVA-Next: CLIP and Mistral": llava_mistral,
}
"""Family to what writes its checkpoint into a folder."""


def full_shape(folder: Path) -> Path:
    """The 256M's shape with SmolLM2-135M-Instruct's text weights and words, and a random tower (0.6 GB, bf16)."""
    from tokenizers import AddedToken, Tokenizer

    from smolvlm_fms.fms_bridge.gguf import GGUFText
    from tests.parity.test_smollm2 import write_checkpoint
    from tests.smollm2 import smollm2_gguf

    build_processor_files(folder, model_type="idefics3", tile=512, longest_edge=2048, image_seq_len=64)
    source = GGUFText(smollm2_gguf())
    write_checkpoint(folder, source)
    tokenizer = Tokenizer.from_str(source.tokenizer_json())
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(88)]
    names = ["<global-img>", *tiles, "<fake_token_around_image>", "<image>", *reserved, "<end_of_utterance>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert token_ids(folder)["<image>"] == 49190
    return folder
