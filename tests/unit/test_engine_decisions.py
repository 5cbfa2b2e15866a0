"""Everything in the engine that decides: without torch, on a backend that only counts."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_fms.engine.byte_cache import ByteCache
from smolvlm_fms.engine.config import BLOCK, EngineConfig
from smolvlm_fms.engine.detokenizer import Detokenizer
from smolvlm_fms.engine.engine import Engine
from smolvlm_fms.engine.kv_cache import KVSpace, Reuse
from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.engine.sequence import Event, Picture, Sampled, Sequence, content_symbols
from smolvlm_fms.engine.stops import LoopDetector, StopStrings
from smolvlm_fms.errors import CapacityError, ConfigurationError, InputError

EOS = 0


class CountingBackend:
    """Answers token t with t + 1 … and keeps a cache of which token was computed where, to check what is reused."""

    kv_bytes_per_token = 10

    def __init__(self, kv_tokens: int = 16 * BLOCK) -> None:
        self.kv_tokens = kv_tokens
        self.cache: list[Any] = [None] * kv_tokens
        self.encoded: list[tuple[bytes, int, int]] = []
        self.prefilled = 0
        self.steps: list[int] = []
        self.fail: Exception | None = None

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.cache[target : target + tokens] = self.cache[source : source + tokens]

    def encode(self, picture: Picture, first: int, count: int) -> None:
        if self.fail is not None:
            raise self.fail
        self.encoded.append((picture.key, first, count))
        if first + count == picture.tiles:
            picture.features = picture.key

    def feature_bytes(self, picture: Picture) -> int:
        return 100 * picture.tiles

    def prefill(self, sequence: Sequence, start: int, count: int) -> Sampled | None:
        assert sequence.extent is not None
        self.prefilled += count
        for place in range(start, start + count):
            self.cache[sequence.extent.start + place] = int(sequence.symbols[place])
        self._check(sequence, start + count)
        return Sampled(sequence.prompt[-1] + 1) if start + count == len(sequence.prompt) else None

    def decode(self, sequences: SequenceOf[Sequence]) -> list[Sampled]:
        self.steps.append(len(sequences))
        for sequence in sequences:
            assert sequence.extent is not None and sequence.computed < sequence.extent.length
            self.cache[sequence.extent.start + sequence.computed] = sequence.output[-1]
            self._check(sequence, sequence.computed + 1)
        return [Sampled(sequence.output[-1] + 1) for sequence in sequences]

    def _check(self, sequence: Sequence, length: int) -> None:
        """Every position that attention would look at holds what this sequence put or copied there."""
        assert sequence.extent is not None
        expected = [*sequence.symbols.tolist(), *sequence.output][:length]
        assert self.cache[sequence.extent.start : sequence.extent.start + length] == expected


def words(ids: SequenceOf[int]) -> str:
    return "".join(f"{token} " for token in ids)


def engine(backend: CountingBackend | None = None, context: int = 10_000, **config: Any) -> Engine:
    return Engine(
        backend or CountingBackend(),
        decode=words,
        stop_tokens=[EOS],
        context_length=context,
        config=EngineConfig(**config),
    )


def answer(generation: Any) -> tuple[list[int], str, str | None]:
    events = list(generation)
    return (
        [sampled.token for event in events for sampled in event.tokens],
        "".join(event.text for event in events),
        events[-1].finish_reason,
    )


def test_an_answer_counts_on_until_its_length() -> None:
    tokens, text, reason = answer(engine().submit([5, 6, 7], options=GenerationOptions(max_tokens=4)))
    assert tokens == [8, 9, 10, 11]
    assert (text, reason) == ("8 9 10 11 ", "length")


def test_stop_tokens_end_an_answer_and_are_not_shown() -> None:
    options = GenerationOptions(max_tokens=9, stop_token_ids=(10,))
    tokens, text, reason = answer(engine().submit([5, 6, 7], options=options))
    assert (tokens, text, reason) == ([8, 9, 10], "8 9 ", "stop")
    tokens, _, reason = answer(engine().submit([-3], options=GenerationOptions(max_tokens=9)))
    assert (tokens, reason) == ([-2, -1, EOS], "stop")
    tokens, _, reason = answer(engine().submit([-3], options=GenerationOptions(max_tokens=4, ignore_eos=True)))
    assert (tokens, reason) == ([-2, -1, EOS, 1], "length")


def test_stop_strings_cut_the_text_across_tokens() -> None:
    options = GenerationOptions(max_tokens=9, stop=("9 1", "never"))
    generation = engine().submit([5, 6, 7], options=options)
    pieces = [event.text for event in generation]
    assert "".join(pieces) == "8 "
    assert generation.sequence.finish_reason == "stop"


def test_prompts_arrive_in_chunks_and_others_go_on_meanwhile() -> None:
    backend = CountingBackend()
    machine = engine(backend, prefill_chunk=4, prefill_chunk_alone=10)
    first = machine.submit([1, 2, 3], options=GenerationOptions(max_tokens=30))
    machine.step()
    long = machine.submit(list(range(100, 120)), options=GenerationOptions(max_tokens=3))
    for _ in range(5):
        machine.step()
    assert len(first.sequence.output) == 6
    assert long.sequence.output == [120]
    assert answer(long)[0] == [120, 121, 122]
    assert answer(first)[0] == list(range(4, 34))


def test_batches_hold_at_most_max_sequences_and_serve_everybody() -> None:
    backend = CountingBackend(64 * BLOCK)
    machine = engine(backend, max_sequences=3)
    generations = [machine.submit([10 * i], options=GenerationOptions(max_tokens=1 + i)) for i in range(9)]
    assert [answer(g)[0] for g in generations] == [list(range(10 * i + 1, 10 * i + 2 + i)) for i in range(9)]
    assert max(backend.steps) == 3
    assert not machine.busy


def test_sequences_wait_for_room_in_the_cache() -> None:
    backend = CountingBackend(2 * BLOCK)
    machine = engine(backend)
    generations = [machine.submit([i], options=GenerationOptions(max_tokens=60)) for i in range(5)]
    assert [len(answer(g)[0]) for g in generations] == [60] * 5
    assert max(backend.steps) == 2


def test_a_common_beginning_is_computed_once() -> None:
    backend = CountingBackend()
    machine = engine(backend)
    turn = list(range(100, 200))
    options = GenerationOptions(max_tokens=5)
    answer(machine.submit(turn, options=options))
    assert backend.prefilled == 100
    follow = machine.submit([*turn, 200, 201, 202, 203, 7, 8], options=options)
    answer(follow)
    assert follow.sequence.reused == 104
    assert backend.prefilled == 102
    again = machine.submit(turn, options=options)
    assert answer(again)[0] == [200, 201, 202, 203, 204]
    assert again.sequence.reused == 99  # the last token is computed, or there were no logits
    machine.space.clear_prefixes()
    assert machine.space.free_tokens == machine.space.capacity


def test_running_sequences_share_their_prompt() -> None:
    backend = CountingBackend()
    machine = engine(backend)
    prompt = list(range(100, 150))
    one = machine.submit(prompt, options=GenerationOptions(max_tokens=20))
    machine.step()
    two = machine.submit([*prompt, 7], options=GenerationOptions(max_tokens=20))
    assert len(answer(two)[0]) == len(answer(one)[0]) == 20
    assert two.sequence.reused == 50


def test_sequences_that_arrive_together_share_their_prompt() -> None:
    """Their prompts are computed one after another, so the later ones find what the first has computed."""
    backend = CountingBackend(32 * BLOCK)
    machine = engine(backend, prefill_chunk=16, prefill_chunk_alone=16)
    prompt = list(range(100, 180))
    questions = [[*prompt, 1000 * number] for number in range(1, 6)]
    generations = [machine.submit(ids, options=GenerationOptions(max_tokens=6)) for ids in questions]
    other = machine.submit(list(range(5000, 5080)), options=GenerationOptions(max_tokens=6))
    for generation, ids in zip(generations, questions, strict=True):
        assert answer(generation)[0] == list(range(ids[-1] + 1, ids[-1] + 7))
    assert answer(other)[0] == list(range(5080, 5086))
    assert [generation.sequence.reused for generation in generations] == [0, 80, 80, 80, 80]
    assert other.sequence.reused == 0
    assert backend.prefilled == 81 + 4 + 80


def test_a_picture_that_arrives_several_times_at_once_is_seen_and_computed_once() -> None:
    backend = CountingBackend(32 * BLOCK)
    machine = engine(backend)
    prompts = [[1, *[9] * 40, 2, 50 + number] for number in range(4)]
    generations = [
        machine.submit(ids, [picture(b"cat", range(1, 41))], GenerationOptions(max_tokens=3)) for ids in prompts
    ]
    for generation in generations:
        answer(generation)
    assert len(backend.encoded) == 2
    assert backend.prefilled == 43 + 3


def test_cancelling_between_two_tiles_leaves_the_picture_to_others() -> None:
    backend = CountingBackend()
    machine = engine(backend)
    options = GenerationOptions(max_tokens=3)
    gone = machine.submit([1, *[9] * 20, 2], [picture(b"cat", range(1, 21), tiles=5)], options)
    other = machine.submit([1, *[9] * 20, 3], [picture(b"cat", range(1, 21), tiles=5)], options)
    for _ in range(2):
        machine.step()
    gone.cancel()
    assert answer(gone) == ([], "", "cancelled") and gone.sequence.extent is None
    assert answer(other)[0] == [4, 5, 6]
    assert [first for _, first, _ in backend.encoded] == [0, 1, 0, 1, 2, 3, 4]
    machine.space.clear_prefixes()
    assert machine.space.free_tokens == machine.space.capacity


def picture(content: bytes, places: SequenceOf[int], tiles: int = 2) -> Picture:
    return Picture(key=content, tiles=tiles, positions=np.asarray(places, dtype=np.int64), pixels=content)


def test_pictures_are_encoded_tile_by_tile_and_once() -> None:
    backend = CountingBackend()
    machine = engine(backend)
    prompt = [1, *[9] * 20, 2]
    options = GenerationOptions(max_tokens=2)
    answer(machine.submit(prompt, [picture(b"cat", range(1, 21))], options))
    assert backend.encoded == [(b"cat", 0, 1), (b"cat", 1, 1)]
    answer(machine.submit([5, *prompt], [picture(b"cat", range(2, 22))], options))
    assert len(backend.encoded) == 2
    other = machine.submit(prompt, [picture(b"dog", range(1, 21))], options)
    answer(other)
    assert len(backend.encoded) == 4
    assert other.sequence.reused == 0, "another picture behind the same ids is another prompt"
    same = machine.submit(prompt, [picture(b"dog", range(1, 21))], options)
    answer(same)
    assert same.sequence.reused == 21
    assert machine.images.used == 400


def test_both_caches_stay_within_their_bytes() -> None:
    backend = CountingBackend(32 * BLOCK)
    per_token = backend.kv_bytes_per_token
    machine = engine(backend, prefix_bytes=4 * BLOCK * per_token + 1, image_cache_bytes=500)
    options = GenerationOptions(max_tokens=2)
    for number in range(12):
        prompt = [1000 * number, *[9] * (40 + 10 * number), 2]
        own = picture(b"%d" % number, range(1, 21), tiles=1 + number % 3)
        answer(machine.submit(prompt, [own], options))
        assert machine.space.prefix_tokens * per_token <= 4 * BLOCK * per_token
        assert machine.images.used <= 500
    assert machine.images.used > 250 and machine.space.prefix_tokens > 2 * BLOCK, "but they are used"
    none = engine(CountingBackend(), prefix_bytes=0)
    answer(none.submit(list(range(100)), options=options))
    again = none.submit(list(range(100)), options=options)
    answer(again)
    assert (again.sequence.reused, none.space.prefix_tokens) == (0, 0)


def test_a_picture_inside_the_reused_prefix_is_not_even_looked_up() -> None:
    backend = CountingBackend()
    machine = engine(backend, image_cache_bytes=0)
    options = GenerationOptions(max_tokens=2)
    prompt = [1, *[9] * 20, 2, 3]
    answer(machine.submit(prompt, [picture(b"cat", range(1, 21))], options))
    answer(machine.submit([*prompt, 4], [picture(b"cat", range(1, 21))], options))
    assert len(backend.encoded) == 2


def test_an_error_ends_its_own_sequence_only() -> None:
    backend = CountingBackend()
    machine = engine(backend)
    good = machine.submit([1, 2], options=GenerationOptions(max_tokens=8))
    machine.step()
    backend.fail = CapacityError("no memory for this picture")
    bad = machine.submit([1, 9, 2], [picture(b"x", [1], tiles=1)])
    with pytest.raises(CapacityError, match="no memory for this picture"):
        answer(bad)
    assert answer(good)[0] == list(range(3, 11))
    machine.space.clear_prefixes()
    assert machine.space.free_tokens == machine.space.capacity


def test_cancelling_frees_the_room_and_leaves_others_alone() -> None:
    backend = CountingBackend(2 * BLOCK)
    machine = engine(backend)
    gone = machine.submit([1], options=GenerationOptions(max_tokens=100))
    waiting = machine.submit([50], options=GenerationOptions(max_tokens=100))
    machine.step()
    for event in gone:
        assert event.tokens
        break
    assert gone.sequence.finish_reason == "cancelled"
    assert answer(waiting)[2] == "length"
    never_started = machine.submit([1], options=GenerationOptions(max_tokens=100))
    never_started.cancel()
    assert answer(never_started) == ([], "", "cancelled")
    assert not machine.busy


def test_threads_may_share_an_engine() -> None:
    machine = engine(CountingBackend(64 * BLOCK))
    results: dict[int, list[int]] = {}

    def ask(start: int) -> None:
        results[start] = answer(machine.submit([start], options=GenerationOptions(max_tokens=40)))[0]

    threads = [threading.Thread(target=ask, args=(1000 * i + 1,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1000 * i + 1: list(range(1000 * i + 2, 1000 * i + 42)) for i in range(8)}


def test_prompts_that_cannot_fit_are_refused_and_answers_end_with_the_context() -> None:
    with pytest.raises(CapacityError, match=r"300 tokens .* context of 200"):
        engine(context=200).submit([1] * 300)
    with pytest.raises(CapacityError, match="kv_bytes"):
        engine(CountingBackend(BLOCK)).submit([1] * BLOCK)
    with pytest.raises(InputError, match="no tokens"):
        engine().submit([])
    tokens, _, reason = answer(engine(context=20).submit(list(range(1, 16)), options=GenerationOptions()))
    assert (len(tokens), reason) == (5, "length")


def test_loops_end_an_answer() -> None:
    class Looping(CountingBackend):
        def decode(self, sequences: SequenceOf[Sequence]) -> list[Sampled]:
            super().decode(sequences)
            return [Sampled(1 + len(sequence.output) % 3) for sequence in sequences]

    tokens, _, reason = answer(engine(Looping()).submit([1], options=GenerationOptions(max_tokens=500)))
    assert reason == "loop" and 90 < len(tokens) < 110
    free = GenerationOptions(max_tokens=300, loop_detection=False)
    assert answer(engine(Looping()).submit([1], options=free))[2] == "length"


@given(st.lists(st.integers(1, 3), max_size=60), st.integers(1, 7), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_loop_detector_agrees_with_its_definition(noise: list[int], period: int, repeats: int) -> None:
    detector = LoopDetector(max_period=8, min_repeats=3, min_tokens=12)
    tokens = noise + list(range(10, 10 + period)) * repeats
    found = [detector.push(token) for token in tokens]

    def is_loop(tail: list[int]) -> bool:
        for p in range(1, 9):
            needed = max(12, 3 * p)
            end = tail[-needed:]
            if len(end) == needed and end[p:] == end[:-p]:
                return True
        return False

    assert found == [is_loop(tokens[: i + 1]) for i in range(len(tokens))]


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_do_not_depend_on_how_the_text_was_cut(text: str, stops: list[str], width: int) -> None:
    checker = StopStrings(stops)
    shown = "".join(checker.push(text[i : i + width]) for i in range(0, len(text), width))
    shown += "" if checker.found is not None else checker.flush()
    # The stop that is complete first ends the text; of several complete at once, the one that began first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)


@given(st.text(max_size=30), st.binary(max_size=4), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_whole_and_never_split_a_character(text: str, junk: bytes, width: int) -> None:
    data = text.encode("utf-8", "surrogatepass") + junk
    chunks = [data[i : i + width] for i in range(0, len(data), width)]

    def decode(ids: SequenceOf[int]) -> str:
        return b"".join(chunks[i] for i in ids).decode("utf-8", "replace")

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(i) for i in range(len(chunks))]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == decode(range(len(chunks)))
    if "\ufffd" not in data.decode("utf-8", "replace"):
        assert not any("\ufffd" in piece for piece in pieces)


class Random:
    """A minimal sequence for KVSpace."""

    def __init__(self, prompt: list[int], max_tokens: int) -> None:
        self.sequence = Sequence(
            id=0,
            prompt=prompt,
            options=GenerationOptions(max_tokens=max_tokens),
            pictures=[],
            stop_tokens=frozenset(),
            seed=0,
            symbols=content_symbols(prompt, []),
            sink=lambda event: None,
        )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 150), st.integers(1, 150), st.booleans()), max_size=40))
@settings(max_examples=80, deadline=None)
def test_space_is_never_given_twice_nor_lost(requests: list[tuple[int, int, int, bool]]) -> None:
    space = KVSpace(8, prefix_blocks=5)
    live: list[Sequence] = []
    for family, length, room, finish in requests:
        sequence = Random([family] * 10 + list(range(length)), room).sequence
        reuse = space.admit(sequence) if sequence.limit <= space.capacity else None
        if reuse is not None:
            assert reuse.tokens < len(sequence.prompt)
            sequence.computed = len(sequence.prompt)
            live.append(sequence)
        if finish and live:
            space.release(live.pop(0))
        owned = sorted((s.extent.start, s.extent.end) for s in live if s.extent is not None)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(owned))
        total = sum(end - start for start, end in owned) + space.free_tokens + space.prefix_tokens
        assert total == space.capacity
        assert space.prefix_tokens <= 5 * BLOCK
    for sequence in live:
        space.release(sequence)
    space.clear_prefixes()
    assert space.free_tokens == space.capacity


def test_a_conversation_grows_in_place_where_there_is_room_for_one_only() -> None:
    space = KVSpace(4)
    first = Random(list(range(100)), 28).sequence
    assert space.admit(first) == Reuse(-1, 0)
    first.computed = 100
    space.release(first)
    second = Random(list(range(150)), 60).sequence
    assert space.admit(second) == Reuse(-1, 100)
    assert second.extent is not None and second.extent.start == 0


def test_byte_cache_forgets_the_oldest_first() -> None:
    cache: ByteCache[str] = ByteCache(10)
    cache.put(b"a", "a", 4)
    cache.put(b"b", "b", 4)
    assert cache.get(b"a") == "a"
    cache.put(b"c", "c", 4)
    assert b"b" not in cache and cache.get(b"a") == "a" and cache.used == 8
    cache.put(b"huge", "x", 11)
    assert b"huge" not in cache and len(cache) == 2
    cache.put(b"a", "new", 2)
    assert cache.used == 6 and cache.get(b"a") == "new"


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
        {"min_p": 2}, {"repetition_penalty": 0}, {"seed": -1}, {"stop": [""]}, {"stop": [1]}, {"logprobs": -1},
        {"logit_bias": {-1: 2.0}}, {"stop_token_ids": ["a"]}, {"temperature": float("nan")}, {"max_tokens": True},
    ],
)  # fmt: skip
def test_options_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        GenerationOptions(**bad)
    with pytest.raises(InputError, match="Unknown option beam_size"):
        GenerationOptions().updated({"beam_size": 4})


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="max_sequences"):
        EngineConfig(max_sequences=0)
    with pytest.raises(ConfigurationError, match="kv_bytes"):
        EngineConfig(kv_bytes=-1)


def test_deciding_needs_no_torch() -> None:
    code = (
        "import sys, smolvlm_fms.engine.engine, smolvlm_fms.engine.scheduler\n"
        "bad = {'torch', 'transformers', 'fms'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_events_have_no_text_twice() -> None:
    seen: list[Event] = []
    machine = engine()
    machine.submit([1], options=GenerationOptions(max_tokens=3), sink=seen.append)
    while machine.busy:
        machine.step()
    assert [event.text for event in seen] == ["2 ", "3 ", "4 "]
    assert [event.finish_reason for event in seen] == [None, None, "length"]


def test_a_receiver_that_fails_ends_its_own_sequence_only(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise ValueError("no")

    machine = engine()
    bad = machine.submit([1], options=GenerationOptions(max_tokens=9), sink=fail)
    good = machine.submit([1], options=GenerationOptions(max_tokens=3))
    assert answer(good)[0] == [2, 3, 4]
    assert bad.sequence.finish_reason == "cancelled"
    assert "receiver" in caplog.text
    assert not machine.busy
