"""The loop: takes requests, plans a step, has the backend compute it, and hands out tokens and text. No torch.

    submit ─▶ inbox ─▶ scheduler.plan ─▶ backend.copy / encode / prefill / decode ─▶ output ─▶ sink(Event)

``submit`` and ``cancel`` may be called from any thread at any time. ``step`` runs one step; whoever waits for an answer
may call it (``drive``), or one thread may do nothing else.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from smolvlm_fms.engine.backend import Backend
from smolvlm_fms.engine.byte_cache import ByteCache
from smolvlm_fms.engine.config import BLOCK, EngineConfig
from smolvlm_fms.engine.kv_cache import KVSpace
from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.engine.output import Output
from smolvlm_fms.engine.scheduler import Encode, Plan, Prefill, Scheduler
from smolvlm_fms.engine.sequence import Event, Picture, Sampled, Sequence, State, content_symbols
from smolvlm_fms.errors import CapacityError, InputError

__all__ = ["Engine", "Generation"]

logger = logging.getLogger(__name__)


class Generation:
    """A caller's view of one sequence: iterate over its events; leaving early cancels it."""

    def __init__(self, engine: Engine, sequence: Sequence, events: deque[Event]) -> None:
        self.engine = engine
        self.sequence = sequence
        self._events = events

    def __iter__(self) -> Iterator[Event]:
        """Yield events until the answer is over; raises what went wrong with this sequence."""
        try:
            while True:
                while self._events:
                    event = self._events.popleft()
                    if event.error is not None:
                        raise event.error
                    yield event
                    if event.finish_reason is not None:
                        return
                if self.sequence.state is State.FINISHED and not self._events:
                    return  # somebody else has read the end
                self.engine.drive(self.sequence)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the sequence at the next step, if it is not over yet."""
        self.engine.cancel(self.sequence)


class Engine:
    """Generates for many callers at once.

    backend: what computes. decode: token ids to text, special tokens left out or not as the checkpoint needs it.
    stop_tokens: ids that end every answer. context_length: tokens that the model can see.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        decode: Callable[[SequenceOf[int]], str],
        stop_tokens: SequenceOf[int],
        context_length: int,
        config: EngineConfig | None = None,
    ) -> None:
        self.backend = backend
        self.config = config or EngineConfig()
        self.context_length = min(context_length, self.config.context_length or context_length)
        self.images: ByteCache[object] = ByteCache(self.config.image_cache_bytes)
        self.space = KVSpace(backend.kv_tokens // BLOCK, self._prefix_blocks())
        self.scheduler = Scheduler(self.config, self.space, self.images.get)
        self._decode = decode
        self._stop_tokens = frozenset(stop_tokens)
        self._inbox: deque[Sequence] = deque()
        self._outputs: dict[int, Output] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count()

    def submit(
        self,
        prompt: SequenceOf[int],
        pictures: SequenceOf[Picture] = (),
        options: GenerationOptions | None = None,
        sink: Callable[[Event], None] | None = None,
    ) -> Generation:
        """Queue a prompt (token ids) with its pictures. Events go to ``sink``, or wait in the Generation returned.

        Raises CapacityError where the prompt leaves no room for an answer, InputError for an empty prompt.
        """
        options = options or GenerationOptions()
        if not prompt:
            raise InputError("The prompt has no tokens; there is nothing to continue.")
        room = min(self.context_length, self.space.capacity) - len(prompt)
        if room < 1:
            limit = (
                f"the model's context of {self.context_length}"
                if self.context_length <= self.space.capacity
                else f"the key-value cache of {self.space.capacity} tokens; pass a larger kv_bytes"
            )
            raise CapacityError(
                f"The prompt has {len(prompt)} tokens and fills {limit}. Use fewer or smaller pictures "
                "(detail='low' or 'auto'), or a shorter text."
            )
        options = options.updated({"max_tokens": min(options.max_tokens, room)})
        stops = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else self._stop_tokens)
        events: deque[Event] = deque()
        sequence = Sequence(
            id=next(self._ids),
            prompt=list(prompt),
            options=options,
            pictures=list(pictures),
            stop_tokens=stops,
            seed=secrets.randbits(63) if options.seed is None else options.seed,
            symbols=content_symbols(prompt, pictures),
            sink=sink or events.append,
        )
        sequence.clock.arrived = time.perf_counter()
        self._outputs[sequence.id] = Output(self._decode, options, stops, options.max_tokens)
        self._inbox.append(sequence)
        return Generation(self, sequence, events)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at the next step, with finish_reason ``"cancelled"``; one that is over stays as it is."""
        sequence.cancelled = True
        if self._lock.acquire(blocking=False):  # else whoever is in a step does it at the beginning of the next one
            try:
                self._take_in()
            finally:
                self._lock.release()

    def drive(self, sequence: Sequence) -> None:
        """Run one step on behalf of a caller who waits for ``sequence``."""
        with self._lock:
            if sequence.state is not State.FINISHED:
                self._step()

    def step(self) -> bool:
        """Run one step for everybody; False when there was nothing to do."""
        with self._lock:
            return self._step()

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._inbox or self.scheduler.waiting or self.scheduler.running)

    def _take_in(self) -> None:
        """Queue what was submitted, end what was cancelled."""
        while self._inbox:
            self.scheduler.add(self._inbox.popleft())
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.cancelled:
                self._finish(sequence, Event(finish_reason="cancelled"))

    def _step(self) -> bool:
        self._take_in()
        plan = self.scheduler.plan()
        self._execute(plan)
        return bool(plan)

    def _execute(self, plan: Plan) -> None:
        for copy in plan.copies:
            self.backend.copy(copy.source, copy.target, copy.tokens)
        for encode in plan.encodes:
            self._guarded([encode.sequence], lambda encode=encode: self._encode(encode))  # type: ignore[misc]
        for prefill in plan.prefills:
            self._guarded([prefill.sequence], lambda prefill=prefill: self._prefill(prefill))  # type: ignore[misc]
        if plan.decodes:
            self._guarded(plan.decodes, lambda: self._decode_step(plan.decodes))

    def _guarded(self, sequences: SequenceOf[Sequence], work: Callable[[], None]) -> None:
        """Do a piece of work; if it fails, its sequences end with the error, and the others go on."""
        try:
            work()
        except Exception as error:
            for sequence in sequences:
                if sequence.state is not State.FINISHED:
                    self._finish(sequence, Event(finish_reason="error", error=error))

    def _encode(self, work: Encode) -> None:
        started = time.perf_counter()
        picture = work.picture
        self.backend.encode(picture, work.first, work.count)
        picture.encoded += work.count
        if picture.features is not None:
            picture.pixels = None
            self.images.put(picture.key, picture.features, self.backend.feature_bytes(picture))
        work.sequence.clock.vision_s += time.perf_counter() - started

    def _prefill(self, work: Prefill) -> None:
        started = time.perf_counter()
        sequence = work.sequence
        sampled = self.backend.prefill(sequence, work.start, work.count)
        sequence.computed += work.count
        sequence.clock.prefill_s += time.perf_counter() - started
        if sampled is not None:
            sequence.state = State.DECODE
            for picture in sequence.pictures:
                picture.features = picture.pixels = None
            self._accept(sequence, sampled)

    def _decode_step(self, sequences: list[Sequence]) -> None:
        results = self.backend.decode(sequences)
        for sequence, sampled in zip(sequences, results, strict=True):
            sequence.computed += 1
            self._accept(sequence, sampled)

    def _accept(self, sequence: Sequence, sampled: Sampled) -> None:
        """Add a token to a sequence and tell its caller."""
        if sequence.clock.first_token is None:
            sequence.clock.first_token = time.perf_counter()
        sequence.output.append(sampled.token)
        text, reason = self._outputs[sequence.id].push(sampled.token)
        event = Event(text=text, tokens=(sampled,), finish_reason=reason)
        if reason is None:
            self._tell(sequence, event)
        else:
            self._finish(sequence, event)

    def _finish(self, sequence: Sequence, event: Event) -> None:
        sequence.finish_reason = event.finish_reason
        sequence.clock.finished = time.perf_counter()
        self._outputs.pop(sequence.id, None)
        self._tell(sequence, event)  # before the state changes: whoever sees FINISHED must find the last event
        self.scheduler.remove(sequence)
        sequence.pictures = []

    @staticmethod
    def _tell(sequence: Sequence, event: Event) -> None:
        """Hand an event to the caller; one whose sink fails is not generated for any longer, the others are."""
        try:
            sequence.sink(event)
        except Exception:
            logger.exception("The receiver of sequence %d failed; the sequence is cancelled.", sequence.id)
            sequence.cancelled = True

    def _prefix_blocks(self) -> int | None:
        if self.config.prefix_bytes is None:
            return None
        return self.config.prefix_bytes // (self.backend.kv_bytes_per_token * BLOCK)
