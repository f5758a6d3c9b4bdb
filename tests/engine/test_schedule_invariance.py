"""The invariant: what a session computes depends on its tokens and its start state only.

Not on how reading was split into steps, nor on batch companions, slots, eviction and reload, the prefix cache or forks.
float64 within 1e-10, float32 within 1e-4 relative. This test may never be skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.core import SamplingParams, Sequence, TurnResult
from nested_runtime.engine.engine import Engine
from nested_runtime.engine.runner import Runner, Span, state_specs
from nested_runtime.models.base import LanguageModel
from nested_runtime.registry import FAMILIES
from nested_runtime.state.codec import decode, encode
from nested_runtime.state.pool import SlotPool
from nested_runtime.state.snapshot import Binding, Snapshot

BuildModel = Callable[[str, torch.dtype], LanguageModel]
LEVELS = [
    "hope+sequential",
    "hope+nested",
    "hope+headwise",
    "hope+pieces",
    "hope+deep",
    "hope+varied",
    "transformer+sequential",
    "hope-attention+stacked",
]
NAMES = ["counter", *FAMILIES, *LEVELS]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
EXAMPLES = settings(max_examples=60, deadline=None)
TOKEN = st.integers(0, 39)
PROMPT = st.lists(TOKEN, min_size=1, max_size=60)


def through_codec(model: LanguageModel, state: dict[str, torch.Tensor], position: int) -> dict[str, torch.Tensor]:
    """The state after a stay in the store."""
    binding = Binding("tenant", "session", 1)
    snapshot = Snapshot.take(state, fingerprint="f", binding=binding, position=position, pending=None)
    return dict(decode(encode(snapshot), state_specs(model), "f", binding).tensors)


def assert_close(name: str, found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0 if dtype == torch.float64 else 1e-2, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((found - expected).abs().max()) / scale if expected.numel() else 0.0
    assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


class Bench:
    """A pool, a runner, and the bench that sessions evicted from it move to."""

    def __init__(self, model: LanguageModel, capacity: int) -> None:
        self.model = model
        self.pool = SlotPool(state_specs(model), capacity)
        self.runner = Runner(model, self.pool, max_tokens=512, max_sequences=capacity)
        self.other = self

    @classmethod
    def pair(cls, model: LanguageModel, capacity: int) -> tuple[Bench, Bench]:
        first, second = cls(model, capacity), cls(model, capacity)
        first.other, second.other = second, first
        return first, second

    def read(self, work: list[tuple[Reader, int]]) -> None:
        """Each reader reads so many tokens: one step, or more where chunks of levels end among them."""
        while work:
            self._update([r for r, _ in work])
            rooms = [(r, min(count, self._room(r))) for r, count in work]
            self._step(rooms)
            work = [(r, count - now) for (r, count), (_, now) in zip(work, rooms, strict=True) if count > now]

    def _room(self, reader: Reader) -> int:
        chunk = self.model.update_chunk
        return chunk - int(self.pool.tensors["chunk.count"][reader.slot]) if chunk else reader.num_unread

    def _update(self, readers: list[Reader]) -> None:
        """Batched as an engine may: who stands at one place of the model's clock."""
        due = [r for r in readers if self._room(r) == 0]
        while due:
            period = self.model.period or 1 << 62
            batch = [r for r in due if r.done % period == due[0].done % period]
            due = [r for r in due if r not in batch]
            slots, tokens, places = torch.tensor([(r.slot, r.tokens[r.done], r.done) for r in batch]).t()
            kv = self.pool.extend(slots.tolist(), [0] * len(batch))
            assert self.model.update(slots, tokens, places, self.pool.tensors, kv).good.all()

    def _step(self, work: list[tuple[Reader, int]]) -> None:
        seen: list[torch.Tensor] = []
        hook = self.model.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        spans = [Span(r.slot, r.done, r.tokens[r.done : r.done + count], range(0)) for r, count in work]
        try:
            assert self.runner.step(spans).bad == set()
        finally:
            hook.remove()
        start = 0
        for reader, count in work:
            reader.hidden.append(seen[0][start : start + count])
            reader.done += count
            start += count


class Reader:
    """One session that reads given tokens on a bench, keeping every hidden state."""

    def __init__(self, tokens: list[int], home: Bench) -> None:
        self.tokens = tokens
        self.home = home
        self.slot = home.pool.acquire()
        self.done = 0
        self.hidden: list[torch.Tensor] = []

    @property
    def num_unread(self) -> int:
        return len(self.tokens) - self.done

    def leave(self) -> dict[str, torch.Tensor]:
        """Give the slot back, return what it held."""
        state = self.home.pool.save(self.slot)
        self.home.pool.release(self.slot)
        return state

    def move(self) -> None:
        """Move to the other bench by way of the codec."""
        state = through_codec(self.home.model, self.leave(), self.done)
        self.home = self.home.other
        self.slot = self.home.pool.acquire()
        self.home.pool.load(self.slot, state)


def read_alone(model: LanguageModel, tokens: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states [T, D] and final state of a session that reads everything at once, with nobody else there."""
    bench = Bench(model, 1)
    reader = Reader(tokens, bench)
    bench.read([(reader, len(tokens))])
    return torch.cat(reader.hidden), reader.leave()


def draw_step(data: st.DataObject, readers: list[Reader]) -> None:
    """Some sessions of one bench read some of their tokens; perhaps one session moves to another bench."""
    first = data.draw(st.sampled_from([r for r in readers if r.num_unread]), "first")
    others = [r for r in readers if r.num_unread and r.home is first.home and r is not first]
    companions = data.draw(st.lists(st.sampled_from(others), unique_by=id), "companions") if others else []
    first.home.read([(r, data.draw(st.integers(1, r.num_unread), "tokens")) for r in (first, *companions)])
    if data.draw(st.booleans(), "evict"):
        data.draw(st.sampled_from(readers), "moved").move()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_any_schedule_gives_the_same_hidden_and_state(name: str, dtype: torch.dtype, build_model: BuildModel) -> None:
    model = build_model(name, dtype)

    @settings(EXAMPLES, max_examples=20 if "+" in name else 60)
    @given(st.data(), st.lists(st.lists(TOKEN, min_size=1, max_size=30), min_size=1, max_size=4))
    def check(data: st.DataObject, texts: list[list[int]]) -> None:
        benches = Bench.pair(model, len(texts))
        readers = [Reader(text, benches[0]) for text in texts]
        while any(reader.num_unread for reader in readers):
            draw_step(data, readers)
        for reader in readers:
            hidden, state = read_alone(model, reader.tokens)
            assert_close("hidden", torch.cat(reader.hidden), hidden, dtype)
            for key, tensor in reader.leave().items():
                assert_close(key, tensor, state[key], dtype)
        for bench in benches:
            bench.pool.check_integrity(deep=True)

    check()


def run(engine: Engine, sequences: list[Sequence], delays: list[int]) -> dict[str, TurnResult]:
    """Submit each sequence before its step, run to the end, return the results by id."""
    results: dict[str, TurnResult] = {}
    waiting = sorted(zip(delays, range(len(sequences)), strict=True))
    step = 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            engine.submit(sequences[waiting.pop(0)[1]])
        for event in engine.step():
            assert event.error is None
            if event.finish is not None:
                assert event.result is not None
                results[event.sequence_id] = event.result
        engine.pool.check_integrity()
        step += 1
    engine.pool.check_integrity(deep=True)
    return results


class Session:
    """A conversation that goes on from turn to turn, each in an engine of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.history: list[int] = []
        self.pending: list[int] = []
        self.state: dict[str, torch.Tensor] | None = None

    def turn(self, text: list[int], max_tokens: int, fork_of: str | None, cache_point: int) -> Sequence:
        start = "fresh" if self.state is None else self.name
        return Sequence(
            self.name,
            self.pending + text,
            SamplingParams(max_tokens=max_tokens, temperature=0.0),
            position=len(self.history),
            state=self.state,
            keep_state=True,
            fork_of=fork_of,
            cache_key=("tenant", "", start) if self.state is None else None,
            cache_upto=cache_point,
            cache_own=("tenant", self.name, start),
            cache_points=(cache_point,),
        )

    def check(self, model: LanguageModel, sequence: Sequence, result: TurnResult) -> None:
        """Compare with one pass over everything the session ever read, then go on from the result."""
        self.history += sequence.tokens[:-1]
        assert (result.position, result.pending) == (len(self.history), sequence.output[-1])
        hidden, expected = read_alone(model, self.history)
        with torch.inference_mode():
            logits = model.logits(hidden[-len(sequence.output) :])
        assert sequence.output == logits.argmax(-1).tolist()
        for key, tensor in result.state.items():
            assert_close(key, tensor, expected[key], torch.float64)
        self.state = through_codec(model, dict(result.state), result.position)
        self.pending = [sequence.output[-1]]


def draw_engine(data: st.DataObject, model: LanguageModel) -> Engine:
    return Engine(
        model,
        capacity=data.draw(st.integers(1, 3), "capacity"),
        max_batch_tokens=data.draw(st.integers(1, 80), "budget"),
        update_share=data.draw(st.sampled_from([0.0, 1.0, 100.0]), "update share"),
        prefix_cache_bytes=data.draw(st.sampled_from([0, 1 << 24]), "cache"),
    )


def regenerate(data: st.DataObject, engine: Engine, sequences: list[Sequence], results: dict[str, TurnResult]) -> None:
    """The same turns again in the same engine: the same tokens and states, whether from the cache or not."""
    chosen = [sequences[0], *(one for one in sequences[1:2] if data.draw(st.booleans(), "again"))]
    copies = [replace(sequence, num_done=0, output=[], fork_of=None) for sequence in chosen]
    again = run(engine, copies, [data.draw(st.integers(0, 2), "delay") for _ in copies])
    for first, copy in zip(chosen, copies, strict=True):
        assert copy.output == first.output
        for key, tensor in again[copy.id].state.items():
            assert_close(key, tensor, results[first.id].state[key], torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_any_engine_gives_the_same_tokens_and_state(name: str, build_model: BuildModel) -> None:
    """Two greedy turns of several sessions, some answered again; arrival, budget, slots, forks and cache are drawn."""
    model = build_model(name, torch.float64)

    @settings(EXAMPLES, max_examples=12 if "+" in name else 30)
    @given(st.data(), PROMPT, st.integers(1, 4))
    def check(data: st.DataObject, head: list[int], count: int) -> None:
        sessions = [Session(str(index)) for index in range(count)]
        for turn in range(2):
            engine = draw_engine(data, model)
            sequences: list[Sequence] = []
            for session in sessions:
                is_fork = turn == 0 and session is not sessions[0] and data.draw(st.booleans(), "fork")
                text = sequences[0].prompt if is_fork else head + data.draw(st.just([]) | PROMPT, "tail")
                length = data.draw(st.integers(1, 6), "max_tokens")
                sequences.append(session.turn(text, length, "0" if is_fork else None, len(head)))
            delays = [0, *(data.draw(st.integers(0, 4), "delay") for _ in sessions[1:])]
            results = run(engine, sequences, delays)
            regenerate(data, engine, sequences, results)
            for session, sequence in zip(sessions, sequences, strict=True):
                session.check(model, sequence, results[session.name])

    check()
