"""llama.cpp's own converter, told three things that the benchmark's checkpoint does not say.

    python benchmarks/peers/convert_llamacpp.py LLAMA_CPP_SOURCE --outtype f16 --outfile text.gguf CHECKPOINT

- It knows tokenizers by a hash of what they make of one text, and the benchmark's has a few hundred tokens of its own.
  That one cuts text as SmolLM's does.
- It looks for the text model's class in ``text_config.architectures``, as the released configurations have it.
- It would import ``sentencepiece`` only to find that there is no such tokenizer.

Everything else is ``convert_hf_to_gguf.py`` as it comes.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source = Path(sys.argv.pop(1))
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import ModelBase, TextModel  # type: ignore[import-not-found]

    load = ModelBase.load_hparams

    def load_hparams(*arguments: Any, **named: Any) -> Any:
        found = load(*arguments, **named)
        text = found.get("text_config", {})
        text["architectures"] = text.get("architectures") or ["LlamaForCausalLM"]
        return found

    def no_sentencepiece(self: Any) -> None:
        raise FileNotFoundError("The benchmark's tokenizer is a tokenizer.json.")

    ModelBase.load_hparams = staticmethod(load_hparams)
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    TextModel._set_vocab_sentencepiece = no_sentencepiece  # it asks for the package before it looks for the file
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
