"""From messages to what the engine takes: prompt tokens, and pictures with a digest of their content.

Pictures are processed one by one, so that a row never depends on its neighbours and a picture seen before costs a
digest and nothing else: its grid is remembered, and its pixels are only made if its features are gone, too.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from smolvlm_fms.engine.byte_cache import ByteCache
from smolvlm_fms.engine.sequence import Picture
from smolvlm_fms.errors import FetchError, ImageError, PromptError, TokenCountError, VideoError
from smolvlm_fms.processing.chat import media_of, metadata_of
from smolvlm_fms.processing.chat_template import normalise_conversations
from smolvlm_fms.processing.literal import LiteralText
from smolvlm_fms.processing.prompt import check_counts, expand_placeholders
from smolvlm_fms.processing.sources import read_file
from smolvlm_fms.processing.tiling import ByteTiles, PixelMap

__all__ = ["Preparer", "Prompt", "content_digest"]

REMEMBERED_GRIDS = 4096
LONGEST_PATH = 4096
WAITING_BYTES = 64 * 2**20
"""Pixels that are kept for pictures whose turn at the tower has not come; a tile of 512 × 512 takes 0.75 MiB as bytes,
3 MiB as floats."""
AS_BYTES = {"do_rescale": False, "do_normalize": False}
"""Options of the processors with which tiles stay bytes."""
ORIENTATION = 0x0112
"""EXIF's tag: the same pixels turned are another picture."""


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine; ``image_tokens`` of its tokens stand for pictures."""

    tokens: list[int]
    pictures: list[Picture]
    image_tokens: int


@dataclass(frozen=True)
class _Tiles:
    """One picture or video as the model will see it: its prompt text, its tiles, and how to make their pixels."""

    key: bytes
    text: str
    count: int
    pixels: Any


class Preparer:
    """Makes prompts for one checkpoint. ``processor`` is its own; ``image_token_id`` the model's.

    tokens_per_tile: of the model; None where it depends on the picture (LLaVA-Next).
    """

    def __init__(self, processor: Any, image_token_id: int, tokens_per_tile: int | None) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        self.tokens_per_tile = tokens_per_tile
        markup_is_control = not processor.keep_special_tokens
        self._literal = LiteralText(processor.tokenizer, processor.tokens, markup_is_control=markup_is_control)
        self._grids: ByteCache[tuple[str, int]] = ByteCache(REMEMBERED_GRIDS)
        self._waiting = _Waiting(WAITING_BYTES)

    def chat(self, messages: SequenceOf[Mapping[str, Any]], detail: str | None = None) -> Prompt:
        """Prepare one conversation, in the chat format that transformers uses.

        detail: ``"low"``, ``"auto"``, ``"high"`` or None (the processor's own setting, by default ``"high"``).
        Raises PromptError, ImageError, VideoError, FetchError or TokenCountError.
        """
        conversations, several = normalise_conversations(messages)
        if several:
            raise PromptError("Several conversations came where one is answered; use batch for many.")
        said = self._literal.marked(conversations[0])  # a control token that somebody typed is text
        text = self.processor.apply_chat_template(said, add_generation_prompt=True)
        (pictures,), (videos,) = media_of(conversations)
        tokens = self.processor.tokens
        check_counts([text], [len(pictures)], len(videos), tokens)
        images = [self._image(source, detail) for source in pictures]
        (known,) = metadata_of(conversations)
        clips = [self._video(source, metadata) for source, metadata in zip(videos, known, strict=True)]
        (expanded,), (places,) = expand_placeholders(
            [text], [tiles.text for tiles in images], [tiles.text for tiles in clips], tokens
        )
        in_order = {"image": iter(images), "video": iter(clips)}
        return self._assemble(expanded, [next(in_order[place.kind]) for place in places])

    def text(self, text: str) -> Prompt:
        """Prepare plain text as it is, without a template or pictures."""
        return self._assemble(text, [])

    def _assemble(self, text: str, media: list[_Tiles]) -> Prompt:
        """Tokenise and say which placeholders belong to which picture."""
        bos = self.processor.tokenizer.bos_token
        ids = self._literal.encode(text, add_special_tokens=not (bos and text.startswith(bos)))
        places = np.flatnonzero(np.asarray(ids, dtype=np.int64) == self.image_token_id)
        counts = [tiles.text.count(self.processor.tokens.image) for tiles in media]
        if len(places) != sum(counts):
            raise TokenCountError(
                f"The prompt has {len(places)} image tokens (id {self.image_token_id}), but its {len(media)} pictures "
                f"give {sum(counts)}: {counts}. Likely cause: a processor that belongs to another checkpoint, or "
                "special tokens typed in a message."
            )
        pictures, start = [], 0
        for tiles, count in zip(media, counts, strict=True):
            end = start + count
            pictures.append(Picture(tiles.key, tiles.count, places[start:end], tiles.pixels))
            start = end
        return Prompt(list(ids), pictures, len(places))

    def _image(self, source: Any, detail: str | None) -> _Tiles:
        named, source = source, _content(source)
        processor = self.processor.image_processor
        tiled = hasattr(processor, "detail")  # LLaVA-Next has one way to cut a picture
        options: dict[str, Any] = {} if detail is None or (detail == "high" and not tiled) else {"detail": detail}
        key = content_digest(source, "image", detail, processor)
        # Arrays may hold floats, and the tensor back end gives floats in any case.
        waits = tiled and processor.backend == "pil" and processor.do_convert_rgb
        waits = waits and isinstance(source, bytes | Image.Image)
        options |= AS_BYTES if waits else {}

        def process() -> Any:
            try:
                batch = self._process(self.processor.tokens.image, images=[[source]], images_kwargs=options)
            except ImageError as error:
                if source is named:
                    raise
                # The processor saw bytes; whoever asked gave a path.
                raise ImageError(f"{named}: {error}") from error
            return _later_floats(batch, processor.pixel_map) if waits else batch

        return self._tiles(key, process)

    def _video(self, source: Any, metadata: Mapping[str, Any] | None) -> _Tiles:
        """Files are sampled as the checkpoint says, frames taken as they are, as in ``apply_chat_template``."""
        processor = self.processor.video_processor
        if processor is None:
            raise VideoError("This checkpoint was not trained on videos; use a SmolVLM2 checkpoint, or pass frames.")
        file = isinstance(source, str | os.PathLike | bytes) or hasattr(source, "read")
        sample = file and processor.fps is not None and processor.num_frames is not None
        options: dict[str, Any] = {"do_sample_frames": True} if sample else {}
        if metadata is not None:
            options["video_metadata"] = [metadata]
        if file:
            options |= AS_BYTES
        key = content_digest(source, "video", processor, metadata)

        def process() -> Any:
            batch = self._process(self.processor.tokens.video, videos=[source], videos_kwargs=options)
            return _later_floats(batch, processor.pixel_map) if file else batch

        return self._tiles(key, process)

    def _process(self, placeholder: str, **media: Any) -> Any:
        """One placeholder and its picture or video through the checkpoint's processor."""
        if self.tokens_per_tile:
            media["image_seq_len"] = self.tokens_per_tile
        return self.processor(
            text=[placeholder],
            return_tensors="pt",
            return_text_replacement_offsets=True,
            **media,
        )

    def _tiles(self, key: bytes, process: Callable[[], Any]) -> _Tiles:
        """The prompt text and tile count of a picture: remembered, or found by processing it now."""
        known = self._grids.get(key)
        if known is not None:
            return _Tiles(key, *known, pixels=_Lazy(process))
        batch = process()
        text = batch["text_replacement_offsets"][0][0]["replacement"]
        pixels = _pixels(batch)
        self._grids.put(key, (text, len(pixels[0])), 1)
        return _Tiles(key, text, len(pixels[0]), pixels if self._waiting.keeps(pixels[0]) else _Lazy(process))


class _Waiting:
    """Counts the bytes of pixels between their making and the tower. Many requests may wait; their pixels may not."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.RLock()  # a collection of garbage may call ``_free`` inside ``keeps``

    def keeps(self, pixels: Any) -> bool:
        """Whether there is room for these; they count until the tensor is gone. One picture always has room."""
        size = int(pixels.nbytes)
        with self._lock:
            if self.used and self.used + size > self.limit:
                return False
            self.used += size
        weakref.finalize(pixels, self._free, size)
        return True

    def _free(self, size: int) -> None:
        with self._lock:
            self.used -= size


class _Lazy:
    """Pixels that are made when the backend asks for them."""

    def __init__(self, process: Callable[[], Any]) -> None:
        self._process = process

    def __call__(self) -> Any:
        return _pixels(self._process())


def _later_floats(batch: Any, pixel_map: PixelMap) -> Any:
    """A batch of one made ``AS_BYTES``: its tiles wait as bytes and are floats when the tower takes them."""
    batch["pixel_values"] = [ByteTiles(batch["pixel_values"][0], pixel_map)]
    return batch


def _pixels(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Tiles (N, C, H, W) of a batch of one sample, and their pixel mask (N, H, W), or None where all are real.

    For LLaVA-Next, one picture's tiles and its (height, width), which says how they are put together.
    """
    if "image_sizes" in batch:
        return batch["pixel_values"][0], tuple(batch["image_sizes"][0].tolist())
    mask = batch.get("pixel_attention_mask")
    return batch["pixel_values"][0], None if mask is None or _all_real(mask) else mask[0]


def _all_real(mask: Any) -> bool:
    """Whether no number of a mask (…, H, W) is 0. Axes that repeat one number, as they do unless a picture was padded,
    are looked at once: all of 17 tiles would take 15 ms."""
    once = [slice(1) if stride == 0 else slice(None) for stride in mask.stride()]
    return bool(mask[tuple(once)].all())


def _content(source: Any) -> Any:
    """A file's bytes where a path came, so that digest and picture are of the same content; else the source itself."""
    if isinstance(source, os.PathLike) or (
        isinstance(source, str) and len(source) < LONGEST_PATH and "://" not in source[:8]
    ):
        try:
            return read_file(source)
        except (FetchError, ImageError):
            return source  # base64, a data: URI, or a path whose error the image processor words
    return source


def content_digest(source: Any, *settings: Any) -> bytes:
    """A digest of a picture's content and of the settings that it is processed with."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str) and len(source) < LONGEST_PATH and os.path.isfile(source):
        with open(source, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    elif isinstance(source, str):  # base64, a data: URI; what a URL answers is taken to stay as it is
        digest.update(source.encode("utf-8", "surrogatepass"))
    elif isinstance(source, bytes | bytearray | memoryview):
        digest.update(source)
    elif isinstance(source, list | tuple):  # the frames of a video
        for frame in source:
            digest.update(content_digest(frame))
    elif hasattr(source, "tobytes") and hasattr(source, "size"):  # Pillow images and NumPy arrays
        array = np.ascontiguousarray(np.asarray(source))
        exif = source.getexif() if hasattr(source, "getexif") else {}
        digest.update(repr((getattr(source, "mode", None), exif.get(ORIENTATION), array.shape, array.dtype)).encode())
        digest.update(array.tobytes())
    elif hasattr(source, "numpy"):  # torch tensors
        return content_digest(source.detach().cpu().float().numpy(), source.dtype, *settings)
    else:
        digest.update(os.urandom(16))  # an open file or the like: never taken for another one
    digest.update(repr(settings).encode("utf-8", "replace"))
    return digest.digest()
