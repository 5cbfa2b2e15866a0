"""What a person uses: ``load`` and the object that it returns."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from smolvlm_fms.bundle import folder_of
from smolvlm_fms.config import read_json_config
from smolvlm_fms.engine.backend import Backend
from smolvlm_fms.engine.checkpoint import GenerationDefaults, read_generation_defaults
from smolvlm_fms.engine.config import BLOCK, EngineConfig
from smolvlm_fms.engine.engine import Engine, Generation
from smolvlm_fms.engine.machine import available_memory, cpu_count, give_back_memory
from smolvlm_fms.engine.prepare import Preparer, Prompt
from smolvlm_fms.engine.quantized import load_stored
from smolvlm_fms.engine.runner import ModelRunner, kv_bytes_per_token
from smolvlm_fms.engine.sequence import Sampled
from smolvlm_fms.errors import CapacityError, ConfigurationError, InputError
from smolvlm_fms.fms_bridge.loading import load_model, resolve_folder
from smolvlm_fms.startup import collection_paused
from smolvlm_fms.types import Answer, Timings, TokenLogprob, Usage

__all__ = ["VLM", "Stream", "load"]

Messages = SequenceOf[Mapping[str, Any]]


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    quantize: str | None = None,
    quantize_tower: str | None = None,
    packed: bool = True,
    engine: EngineConfig | None = None,
    **loading: Any,
) -> VLM:
    """Load a checkpoint for generation.

    name: a folder, a hub id, or ``"demo"`` (bundled). dtype: of the weights, as torch's or its name (None: the
    checkpoint's own). threads: CPU threads of this process (None: what the machine or container has). quantize:
    ``"int8"`` or ``"int4"`` weights for the text model (on a GPU by torchao). quantize_tower: ``"int8"`` for the vision
    tower, too. packed: on the CPU in bf16, put the weights into the form that is computed with fastest; ``.model``
    still computes, but cannot be saved or trained any more. A folder of ``smolvlm convert --quantize`` is loaded as it
    is quantised. engine: sizes of caches and batches. loading: further arguments of ``load_model`` (``revision``,
    ``progress`` …).

    fp32 computes exactly what transformers does.
    Raises FetchError, CheckpointError, ConfigurationError or CapacityError.
    """
    started = time.perf_counter()
    _set_threads(threads)
    folder = resolve_folder(folder_of(name))
    wanted, where = _dtype(dtype, quantize or quantize_tower), _device(device)
    if packed and where.type == "cpu" and (wanted or _named_dtype(folder)) == torch.bfloat16:
        loading.setdefault("fused_weights", False)  # packing joins them: done before, it would be one more copy of all
    config = engine or EngineConfig.for_device(where.type)
    with collection_paused(), ThreadPoolExecutor(1) as pool:
        # Beside the weights: packing them leaves Python's lock to the tokenizer's file and to imports.
        reading = pool.submit(_processor, folder)
        stored = load_stored(folder, quantize, wanted, where, packed)
        if stored is not None:
            model, quantize = stored
        else:
            model = load_model(folder, dtype=wanted, device=where, **loading)
        runner = _backend(model, config, lambda: reading.result()[1].banned, packed, quantize, quantize_tower)
        processor, defaults = reading.result()
    give_back_memory()
    return VLM(model, processor, runner, defaults, config, name=str(name), load_s=time.perf_counter() - started)


class VLM:
    """A model with its processor and an engine. Its methods may be called from several threads; they share batches."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        backend: Any,
        defaults: GenerationDefaults,
        config: EngineConfig,
        *,
        name: str = "",
        load_s: float = 0.0,
    ) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.load_s = load_s
        self.defaults = defaults
        skip = not processor.keep_special_tokens
        self.engine = Engine(
            backend,
            decode=lambda ids: str(processor.tokenizer.decode(list(ids), skip_special_tokens=skip)),
            stop_tokens=defaults.stop_tokens,
            context_length=model.config.text.max_position_embeddings,
            config=config,
        )
        fixed = hasattr(model.config, "scale_factor")  # LLaVA-Next's pictures differ in tokens, its tiles do not say
        tokens_per_tile = model.config.tokens_per_tile if fixed else None
        self.preparer = Preparer(processor, model.config.image_token_id, tokens_per_tile)

    def ask(self, images: Any, question: str, *, system: str | None = None, **options: Any) -> Answer:
        """Answer a question about pictures.

        images: one picture or a list of them (path, URL, data: URI, bytes, Pillow image, array), or None. ``options``
        are ``detail`` (``"low"``, ``"auto"``, ``"high"``) and the fields of GenerationOptions (``max_tokens``,
        ``temperature``, ``stop`` …).
        """
        return self.stream(images, question, system=system, **options).finish()

    def stream(self, images: Any, question: str, *, system: str | None = None, **options: Any) -> Stream:
        """The same, piece by piece: iterate over the text; afterwards ``.answer`` holds the whole."""
        return self.stream_chat(_question(images, question, system), **options)

    def chat(self, messages: Messages, **options: Any) -> Answer:
        """Answer a conversation in the chat format that transformers uses."""
        return self.stream_chat(messages, **options).finish()

    def stream_chat(self, messages: Messages, *, detail: str | None = None, **options: Any) -> Stream:
        """The same, piece by piece."""
        chosen = self.defaults.options.updated(options)
        started = time.perf_counter()
        prompt = self.preparer.chat(messages, detail)
        return self._submit(prompt, chosen, started)

    def complete(self, text: str, **options: Any) -> Answer:
        """Continue plain text, without a chat template."""
        chosen = self.defaults.options.updated(options)
        started = time.perf_counter()
        return self._submit(self.preparer.text(text), chosen, started).finish()

    def batch(self, requests: Iterable[Any], **options: Any) -> list[Answer]:
        """Answer many requests, several at once, and return the answers in their order.

        Each is ``(images, question)``, a mapping of ``ask``'s arguments, or a conversation (a list of messages);
        ``options`` hold for all of them. Pictures are prepared as their turn comes. A request that cannot be answered
        raises when its turn comes; nothing after it is returned.
        """
        return list(self.iterate(requests, **options))

    def iterate(self, requests: Iterable[Any], **options: Any) -> Iterator[Answer]:
        """``batch``, but yielding every answer as soon as it and those before it are there."""
        window: deque[Stream] = deque()
        try:
            for request in requests:
                window.append(self._start(request, options))
                if len(window) > self.engine.config.max_sequences:
                    yield window.popleft().finish()
            while window:
                yield window.popleft().finish()
        finally:
            for stream in window:
                stream.cancel()

    def _start(self, request: Any, options: Mapping[str, Any]) -> Stream:
        if isinstance(request, Mapping):
            return self.stream(**{**options, "images": None, **request})
        if isinstance(request, tuple) and len(request) == 2:
            return self.stream(*request, **options)
        if isinstance(request, list):
            return self.stream_chat(request, **options)
        raise InputError(
            f"A request is (images, question), a mapping of ask's arguments, or a list of messages; "
            f"{type(request).__name__} came."
        )

    def _submit(self, prompt: Prompt, options: Any, started: float) -> Stream:
        generation = self.engine.submit(prompt.tokens, prompt.pictures, options)
        return Stream(generation, prompt.image_tokens, self.name, self.load_s, started)


class Stream:
    """An answer on its way: iterate for pieces of text; ``answer`` or ``finish()`` for the whole.

    Leaving the loop early, or ``cancel()``, ends the generation; ``answer`` is then what there was.
    """

    def __init__(self, generation: Generation, image_tokens: int, model: str, load_s: float, started: float) -> None:
        self._generation = generation
        self._image_tokens = image_tokens
        self._model = model
        self._load_s = load_s
        self._started = started
        self._pieces: list[str] = []
        self._sampled: list[Sampled] = []

    def __iter__(self) -> Iterator[str]:
        for event in self._generation:
            self._pieces.append(event.text)
            self._sampled.extend(event.tokens)
            if event.text:
                yield event.text

    def cancel(self) -> None:
        """End the generation."""
        self._generation.cancel()

    def finish(self) -> Answer:
        """Wait for the end and return the answer."""
        for _ in self:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The answer so far; ``finish_reason`` is ``""`` while it is not over."""
        sequence = self._generation.sequence
        wants = sequence.options.logprobs is not None
        return Answer(
            text="".join(self._pieces),
            tokens=tuple(sampled.token for sampled in self._sampled),
            finish_reason=sequence.finish_reason or "",
            usage=Usage(len(sequence.prompt), self._image_tokens, len(self._sampled), sequence.reused),
            timings=self._timings(),
            model=self._model,
            logprobs=tuple(TokenLogprob(s.token, s.logprob or 0.0, s.top) for s in self._sampled) if wants else None,
        )

    def _timings(self) -> Timings:
        clock = self._generation.sequence.clock
        end = clock.finished or time.perf_counter()
        first = clock.first_token or end
        return Timings(
            load_s=self._load_s,
            preprocess_s=clock.arrived - self._started,
            vision_s=clock.vision_s,
            prefill_s=clock.prefill_s,
            decode_s=end - first,
            ttft_s=first - self._started,
            total_s=end - self._started,
        )


def _question(images: Any, question: str, system: str | None) -> list[dict[str, Any]]:
    if not isinstance(question, str):
        raise InputError(f"The question is a string; {type(question).__name__} came.")
    pictures = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    parts = [{"type": "image", "image": picture} for picture in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return messages


def _dtype(dtype: torch.dtype | str | None, quantize: str | None) -> torch.dtype | None:
    if dtype is None and quantize is not None:
        return torch.bfloat16
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigurationError(f"dtype is {dtype!r}; float32, bfloat16 and float16 are possible.")
    return found


def _processor(folder: Path) -> tuple[Any, GenerationDefaults]:
    """The processor, and what the first picture and the first prompt would import otherwise."""
    import jinja2.sandbox  # noqa: F401
    from PIL import Image

    from smolvlm_fms.processing.factory import load_processor

    Image.init()
    processor = load_processor(folder)
    return processor, read_generation_defaults(folder, processor.tokenizer)


def _named_dtype(folder: Path) -> torch.dtype | None:
    """What config.json says that its tensors are; a hint."""
    values = read_json_config(folder)
    named = getattr(torch, str(values.get("dtype") or values.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else None


def _backend(
    model: Any,
    config: EngineConfig,
    banned: Callable[[], SequenceOf[int]],
    packed: bool,
    quantize: str | None,
    quantize_tower: str | None,
) -> Backend:
    """The fastest backend that computes this model as it was asked for. ``banned`` is asked when the weights are in
    their place."""
    from smolvlm_fms.engine import cpu_runner, kernels

    if packed and cpu_runner.suits(model):
        cpu_runner.pack_model(model, quantize, quantize_tower)
        sort = cpu_runner.CpuRunner if kernels.available() else cpu_runner.FallbackRunner
        return sort(model, _kv_tokens(model, config), banned())
    weight = model.text_model.base_model.dec_norm.weight
    if weight.is_cuda and quantize_tower is None:
        from smolvlm_fms.engine.graph_runner import GraphRunner
        from smolvlm_fms.engine.torchao_weights import quantize_text

        if quantize is not None:
            quantize_text(model, quantize)
        return GraphRunner(model, _kv_tokens(model, config), banned(), compile_step=config.compile_decode)
    if quantize is not None or quantize_tower is not None:
        raise ConfigurationError(
            f"Quantised weights need a model in bfloat16 on the CPU and packed=True, or a GPU (text model only); "
            f"this model is in {weight.dtype} on {weight.device}."
        )
    return ModelRunner(model, _kv_tokens(model, config), banned())


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device is {device!r}, which torch does not know: {error}") from error


def _set_threads(threads: int | None) -> None:
    """Torch's threads and our kernels' (they ask torch). A container's quota is obeyed where nobody chose."""
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads must be at least 1; it is {threads}.")
    wanted = threads or min(torch.get_num_threads(), cpu_count())
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)


def _kv_tokens(model: Any, config: EngineConfig) -> int:
    """Tokens in the cache: what ``kv_bytes`` holds, by default one full context within reason."""
    weight = model.text_model.base_model.dec_norm.weight
    per_token = kv_bytes_per_token(model, weight.dtype)
    budget = config.kv_bytes
    if budget is None:
        context = min(model.config.text.max_position_embeddings, config.context_length or 2**60)
        wanted = max(512 * 2**20, (context + BLOCK) * per_token)
        if weight.is_cuda:  # there are many sequences at once, and nobody else wants the memory
            budget = torch.cuda.mem_get_info(weight.device)[0] // 2
        else:
            budget = min(wanted, available_memory() // 4)
    tokens = budget // per_token // BLOCK * BLOCK
    if tokens < BLOCK:
        raise CapacityError(
            f"kv_bytes {budget} holds {budget // per_token} tokens of keys and values ({per_token} bytes each); "
            f"at least {BLOCK} are needed."
        )
    return int(tokens)
