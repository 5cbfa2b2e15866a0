"""The checkpoint's tokenizer, read from its folder and run by the ``tokenizers`` library.

    tokenizer = SmolVLMTokenizer.from_pretrained(folder)
    tokenizer(["one text", "another"], padding=True, return_tensors="pt")     # input_ids, attention_mask: (B, T) int64
    tokenizer.batch_decode(ids, skip_special_tokens=True)

It takes the calls of transformers' ``PreTrainedTokenizerFast`` that processors, training and the engine make, and gives
the same ids. Both layouts of ``tokenizer_config.json`` are read: transformers 4 (``added_tokens_decoder``, a list of
``additional_special_tokens``) and 5 (named ``extra_special_tokens``). Calls never change the Rust tokenizer's padding
or truncation, so one tokenizer serves several threads.

tokenizer.json is run as it stands, whatever class the configuration names. (transformers 5 rebuilds ``GPT2Tokenizer``,
which SmolVLM's first folders name, without the splitter of single digits that those checkpoints were trained with.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from smolvlm_fms.errors import ConfigurationError, FetchError, InputError
from smolvlm_fms.processing.files import read_json, write_json

__all__ = ["SmolVLMTokenizer", "TokenBatch", "as_kind"]

logger = logging.getLogger(__name__)

STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Classes that both majors of transformers know how to open with nothing but a tokenizer.json.
SAVED_CLASS = "PreTrainedTokenizerFast"
# Longer limits mean "no limit" (transformers writes 10^30 for that).
UNLIMITED = 10**20

Side = Literal["left", "right"]


class TokenBatch(dict[str, Any]):
    """What a tokenizer call returns: a dictionary whose keys can be read as attributes, and the raw encodings.

    encodings: one ``tokenizers.Encoding`` a row (offsets, word ids, overflow).
    """

    def __init__(self, data: Mapping[str, Any], encodings: Sequence[Encoding] = ()) -> None:
        super().__init__(data)
        self.encodings = list(encodings)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"TokenBatch has no {name!r}; it holds {sorted(self)}") from None


class SmolVLMTokenizer:
    """A checkpoint's tokenizer.

    backend: the Rust tokenizer; configuration: the contents of tokenizer_config.json.

    Every special token of the configuration is an attribute, and its id with ``_id`` behind it: ``pad_token``,
    ``pad_token_id``, ``eos_token_id``, and the named ones of SmolVLM2 (``image_token``, ``end_of_utterance_token`` …).
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, backend: Tokenizer, configuration: Mapping[str, Any] | None = None) -> None:
        self.configuration = dict(configuration or {})
        self._backend = backend
        baked_padding, baked_truncation = backend.padding or {}, backend.truncation or {}
        backend.no_padding()
        backend.no_truncation()
        settings = self.configuration
        self.padding_side: Side = _side(settings.get("padding_side", baked_padding.get("direction", "right")))
        self.truncation_side: Side = _side(settings.get("truncation_side", baked_truncation.get("direction", "right")))
        limit = settings.get("model_max_length", settings.get("max_len"))
        self.model_max_length: int = int(limit) if limit is not None else 10**30
        self.clean_up_tokenization_spaces = bool(settings.get("clean_up_tokenization_spaces", False))
        self.split_special_tokens = bool(settings.get("split_special_tokens", False))
        self.chat_template = _templates(settings.get("chat_template"))
        self._named, self._extra = _special_tokens(settings)
        if "pad_token" not in self._named and "pad_token" in baked_padding:
            self._named["pad_token"] = baked_padding["pad_token"]
        self._register(settings.get("added_tokens_decoder") or {})

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> SmolVLMTokenizer:
        """Read the tokenizer of a checkpoint folder; ``overrides`` replace fields of tokenizer_config.json.

        Raises FetchError where tokenizer.json is missing, ConfigurationError where a file cannot be read.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FetchError(f"{folder} has no tokenizer.json; a checkpoint folder needs one beside its config.json.")
        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise ConfigurationError(f"{file} is not a tokenizer that can be read: {error}") from error
        configuration = read_json(folder / "tokenizer_config.json", missing_ok=True)
        if "added_tokens_decoder" not in configuration:
            for name, value in read_json(folder / "special_tokens_map.json", missing_ok=True).items():
                if name != "extra_special_tokens" or not configuration.get(name):
                    configuration[name] = value
        template = folder / "chat_template.jinja"
        if template.is_file():
            configuration["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, configuration | overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json as transformers 4 and 5 read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        standard = {name: token for name, token in self._named.items() if name in STANDARD_NAMES}
        named = {name: token for name, token in self._named.items() if name not in STANDARD_NAMES}
        dropped = ("chat_template", "tokenizer_file", "name_or_path", "added_tokens_decoder", "extra_special_tokens")
        content = {name: value for name, value in self.configuration.items() if name not in dropped}
        content |= {
            **standard,
            **named,
            "additional_special_tokens": self._extra,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "tokenizer_class": SAVED_CLASS,
            # In transformers 4 this class would add token_type_ids, which no model of the family takes.
            "model_input_names": list(self.model_input_names),
        }
        if named:
            content["extra_special_tokens"] = named
        write_json(folder / "tokenizer_config.json", content)
        write_json(folder / "special_tokens_map.json", {**standard, "additional_special_tokens": self._extra})

    def __call__(
        self,
        text: str | Sequence[Any],
        text_pair: str | Sequence[Any] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> TokenBatch:
        """Token ids of one text or several.

        padding: True or ``"longest"``, ``"max_length"``, False; truncation: True or ``"longest_first"``, False; what is
        cut off stands on ``truncation_side``. return_tensors: ``"pt"`` (torch int64), ``"np"``, or None for lists; one
        string without return_tensors gives flat lists. The other arguments are transformers' of the same names.

        Raises InputError for a text that is none, an unknown choice, or rows of different length asked for as a tensor.
        """
        batched = isinstance(text, list | tuple) and not (is_split_into_words and not _nested(text))
        rows = self._rows(text, text_pair, batched, is_split_into_words)
        pad, cut, max_length = self._strategies(padding, truncation, max_length, pad_to_multiple_of)
        backend = self._splitter if _first(split_special_tokens, self.split_special_tokens) else self._backend
        if cut:
            encodings = self._encode_cut(
                backend, rows, add_special_tokens, is_split_into_words, max_length or 0, stride, paired=text_pair
            )
        else:
            encodings = backend.encode_batch(
                rows, add_special_tokens=add_special_tokens, is_pretokenized=is_split_into_words
            )
        owners = list(range(len(encodings)))
        if return_overflowing_tokens:
            owners = [row for row, one in enumerate(encodings) for _ in range(1 + len(one.overflowing))]
            encodings = [piece for one in encodings for piece in (one, *one.overflowing)]
        if pad:
            self._pad(encodings, max_length if pad == "max_length" else None, pad_to_multiple_of, padding_side)
        data: dict[str, Any] = {"input_ids": [one.ids for one in encodings]}
        if return_token_type_ids:
            data["token_type_ids"] = [one.type_ids for one in encodings]
        if return_attention_mask is not False:
            data["attention_mask"] = [one.attention_mask for one in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [one.special_tokens_mask for one in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [one.offsets for one in encodings]
        if return_length:
            data["length"] = [len(one.ids) for one in encodings]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = owners
        kind = getattr(return_tensors, "value", return_tensors)
        if kind is None and not batched and not return_overflowing_tokens:
            data = {name: value[0] if isinstance(value[0], list) else value for name, value in data.items()}
        elif kind is not None:
            data = {name: as_kind(name, value, kind) for name, value in data.items()}
        return TokenBatch(data, encodings)

    def encode(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """Token ids of one text, as a list."""
        ids: list[int] = self(text, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]
        return ids

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """Text of one row of ids (list, array, tensor or a single id), or a list of texts for several rows."""
        rows = _to_list(token_ids)
        if isinstance(rows, int):
            rows = [rows]
        if rows and isinstance(rows[0], list):
            texts = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
            return [self._clean(text, clean_up_tokenization_spaces) for text in texts]
        return self._clean(
            self._backend.decode(rows, skip_special_tokens=skip_special_tokens), clean_up_tokenization_spaces
        )

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """Texts of several rows of ids; always a list."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token (the unknown token's where there is none, else None), or the ids of several."""
        if isinstance(tokens, str):
            found = self._backend.token_to_id(tokens)
            return self.unk_token_id if found is None and tokens != self._named.get("unk_token") else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> Any:
        """Token of an id, or the tokens of several; None for an id that there is none for."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(int(one)) for one in _to_list(ids) if int(one) not in skipped]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Tokens of one text, as the vocabulary spells them."""
        tokens: list[str] = self._backend.encode(text, add_special_tokens=add_special_tokens).tokens
        return tokens

    def add_special_tokens(self, tokens: Sequence[str]) -> int:
        """Make these special tokens, adding those that the vocabulary lacks; returns how many it lacked."""
        self._extra += [token for token in tokens if token not in self.all_special_tokens]
        self.__dict__.pop("_splitter", None)
        return self._backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, the added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without the added tokens."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The Rust tokenizer. Do not change its padding or truncation: other threads read it."""
        return self._backend

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Name and spelling of every named special token."""
        return dict(self._named)

    @property
    def all_special_tokens(self) -> list[str]:
        """Spelling of every special token of the configuration, each once."""
        return list(dict.fromkeys([*self._named.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of ``all_special_tokens``."""
        ids: list[int] = self.convert_tokens_to_ids(self.all_special_tokens)
        return ids

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is no ordinary attribute: the special tokens and their ids.
        named = self.__dict__.get("_named", {})
        spelled = name.removesuffix("_id")
        if spelled in named:
            return named[spelled] if spelled == name else self.convert_tokens_to_ids(named[spelled])
        if spelled in STANDARD_NAMES:
            return None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STANDARD_NAMES:
            if not isinstance(value, str):
                raise InputError(f"{name} must be a string, got {value!r}.")
            self._named[name] = value
            return
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_splitter"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def _splitter(self) -> Tokenizer:
        """A copy that reads special tokens in the text as ordinary characters."""
        copy = Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def _register(self, decoder: Mapping[str, Any]) -> None:
        """Add the configuration's tokens that tokenizer.json lacks, and mark the special ones as special."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        missing = [
            AddedToken(**{name: value for name, value in token.items() if name != "__type"})
            for _, token in sorted(decoder.items(), key=lambda item: int(item[0]))
            if token["content"] not in known
        ]
        if missing:
            self._backend.add_tokens(missing)
        self._backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self.all_special_tokens]
        )

    def _rows(self, text: Any, pair: Any, batched: bool, split: bool) -> list[Any]:
        texts = list(text) if batched else [text]
        kind = (list, tuple) if split else str
        for row in texts:
            if not isinstance(row, kind):
                raise InputError(
                    f"A text must be a {'list of words' if split else 'string'}, got {type(row).__name__} {row!r:.80}."
                )
        if not texts:
            raise InputError("The list of texts is empty; pass at least one.")
        if pair is None:
            return texts
        pairs = list(pair) if batched else [pair]
        if isinstance(pair, str) is batched or len(pairs) != len(texts):
            raise InputError(f"text_pair must match text: {len(texts)} text(s) came with {len(pairs)} pair(s).")
        return list(zip(texts, pairs, strict=True))

    def _strategies(
        self, padding: bool | str, truncation: bool | str | None, max_length: int | None, multiple: int | None
    ) -> tuple[str, bool, int | None]:
        """What to do about the length: ``""``, ``"longest"`` or ``"max_length"``; whether to cut; the length."""
        padding, truncation = getattr(padding, "value", padding), getattr(truncation, "value", truncation)
        if max_length is not None and padding is False and truncation is None:
            truncation = True  # a length alone means: no longer than that
        choices = {True: "longest", "longest": "longest", "max_length": "max_length"}
        pad = "" if padding in (False, None, "do_not_pad") else choices.get(padding)
        if pad is None:
            raise InputError(f"padding must be True, 'longest', 'max_length' or False, got {padding!r}.")
        if truncation not in (None, False, True, "do_not_truncate", "longest_first", "only_first"):
            raise InputError(f"truncation must be True, 'longest_first' or False, got {truncation!r}.")
        cut = truncation not in (None, False, "do_not_truncate")
        if max_length is None and (pad == "max_length" or cut):
            if self.model_max_length > UNLIMITED:
                pad, cut = ("" if pad == "max_length" else pad), False
            else:
                max_length = self.model_max_length
        if pad and self.pad_token_id is None:
            raise InputError("The tokenizer has no padding token; set tokenizer.pad_token to one of its tokens first.")
        if pad and cut and multiple and max_length and max_length % multiple:
            raise InputError(f"max_length {max_length} is no multiple of pad_to_multiple_of {multiple}.")
        return pad, cut, max_length

    def _encode_cut(
        self, backend: Tokenizer, rows: list[Any], add_special_tokens: bool, split: bool, limit: int, stride: int,
        paired: Any,
    ) -> list[Encoding]:  # fmt: skip
        if paired is not None:
            raise InputError("Truncation of text pairs is not supported; cut the texts first.")
        added = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        if stride and stride >= limit - added:
            raise InputError(f"stride {stride} must be smaller than max_length {limit} less {added} special tokens.")
        encodings = backend.encode_batch(rows, add_special_tokens=False, is_pretokenized=split)
        for one in encodings:
            one.truncate(max(limit - added, 0), stride=stride, direction=self.truncation_side)
        if not added:
            return encodings
        return [backend.post_process(one, add_special_tokens=True) for one in encodings]

    def _pad(
        self, encodings: list[Encoding], length: int | None, multiple: int | None, side: Side | None
    ) -> None:  # fmt: skip
        target = length if length is not None else max(len(one.ids) for one in encodings)
        if multiple:
            target = -(-target // multiple) * multiple
        for one in encodings:
            one.pad(
                target,
                direction=_side(side or self.padding_side),
                pad_id=self.pad_token_id,
                pad_type_id=0,
                pad_token=self.pad_token,
            )

    def _clean(self, text: str, asked: bool | None) -> str:
        """Blanks in front of punctuation are WordPiece's habit; in a byte-level BPE they are the text's own."""
        if not _first(asked, self.clean_up_tokenization_spaces) or type(self._backend.model).__name__ == "BPE":
            return text
        for found, wanted in (
            (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
            (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
        ):  # fmt: skip
            text = text.replace(found, wanted)
        return text


def _special_tokens(configuration: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Named special tokens (the seven standard names first) and the nameless rest, out of either layout."""
    extra = configuration.get("extra_special_tokens") or {}
    found: dict[str, Any] = {name: value for name, value in configuration.items() if name.endswith("_token")}
    if isinstance(extra, Mapping):
        found |= extra
        extra = []
    named = {name: _spelling(value) for name, value in found.items() if isinstance(value, str | Mapping)}
    ordered = {name: named[name] for name in STANDARD_NAMES if name in named}
    nameless = list(extra) or list(configuration.get("additional_special_tokens") or [])
    return ordered | named, list(dict.fromkeys(_spelling(token) for token in nameless))


def _spelling(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _templates(value: Any) -> str | dict[str, str] | None:
    """A template, or several by name; older files hold a list of ``{"name": …, "template": …}``."""
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return value  # type: ignore[no-any-return]


def _side(value: str) -> Side:
    side = str(value).lower()
    if side == "left":
        return "left"
    if side == "right":
        return "right"
    raise InputError(f"A side is 'left' or 'right', got {value!r}.")


def _nested(text: Any) -> bool:
    return bool(text) and isinstance(text[0], list | tuple)


def _first(asked: bool | None, otherwise: bool) -> bool:
    return otherwise if asked is None else asked


def _to_list(ids: Any) -> Any:
    if hasattr(ids, "tolist"):
        return ids.tolist()
    if isinstance(ids, list | tuple):
        return [_to_list(one) for one in ids]
    return int(ids)


def as_kind(name: str, rows: list[Any], kind: str | None) -> Any:
    """Rows of whole numbers as a torch or NumPy array (``"pt"``, ``"np"``), or as they are (None)."""
    if kind is None:
        return rows
    ragged = len({len(row) for row in rows if isinstance(row, list)}) > 1
    if kind == "np":
        if ragged:
            return np.array([np.asarray(row) for row in rows], dtype=object)
        return np.asarray(rows, dtype=np.int64 if not np.size(rows) else None)
    if kind != "pt":
        raise InputError(f"return_tensors must be 'pt', 'np' or None, got {kind!r}.")
    if ragged:
        raise InputError(
            f"{name}: the rows have different lengths {sorted({len(row) for row in rows})} and make no tensor; "
            f"pass padding=True."
        )
    import torch

    return torch.tensor(rows, dtype=torch.int64)
