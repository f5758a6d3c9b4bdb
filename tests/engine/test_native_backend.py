"""NativeBackend with its real thread: streaming, aborting, draining, failing."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
import torch

from nested_runtime.backends.native import NativeBackend
from nested_runtime.core import FinishReason, SamplingParams, Sequence, TokenEvent
from nested_runtime.engine.engine import Engine
from nested_runtime.errors import ContextOverflow, NestedError, Overloaded, RequestError

Scenario = Callable[[NativeBackend, Engine], Awaitable[None]]


def ask(name: str, prompt: list[int] | None = None, max_tokens: int = 5, **fields: Any) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Sequence(name, prompt or [1, 2, 3], params, **fields)


def play(model: Any, scenario: Scenario, **options: Any) -> None:
    """Run the scenario on a started backend, drain it, check that the pool is clean and the thread gone."""
    engine = Engine(model, capacity=2, max_queue=3, prefix_cache_bytes=1 << 20)
    backend = NativeBackend(engine, model_id="m", fingerprint="f", **options)

    async def main() -> None:
        await backend.start()
        try:
            await scenario(backend, engine)
        finally:
            await backend.drain(5)

    asyncio.run(asyncio.wait_for(main(), 30))
    engine.pool.check_integrity(deep=True)
    assert engine.pool.num_free == engine.pool.capacity
    assert backend._thread is not None
    assert not backend._thread.is_alive()


async def collect(backend: NativeBackend, sequence: Sequence) -> list[TokenEvent]:
    return [event async for event in backend.submit(sequence)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the condition belongs to another thread
        await asyncio.sleep(0.001)


def slow(model: Any, seconds: float = 0.01) -> None:
    model.register_forward_hook(lambda *_: time.sleep(seconds))


def test_many_streams_at_once_equal_the_engine(counter: Any) -> None:
    engine = Engine(counter)
    alone = ask("alone")
    engine.submit(alone)
    while engine.has_work:
        engine.step()

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        replies = await asyncio.gather(*(collect(backend, ask(str(i), keep_state=True)) for i in range(5)))
        for events in replies:
            assert [event.token for event in events] == alone.output
            assert events[-1].finish is FinishReason.LENGTH
            assert events[-1].result is not None
        stats = backend.stats()
        assert (stats["streams"], stats["running"], stats["sampled_tokens"]) == (0, 0, 25)

    play(counter, scenario)


def test_leaving_a_stream_aborts_it(counter: Any) -> None:
    slow(counter)

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        async with aclosing(backend.submit(ask("closed", max_tokens=10_000))) as stream:
            assert (await anext(stream)).token is not None
        await until(lambda: backend.stats()["running"] == 0 and not backend.stats()["streams"])
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

        backend.submit(ask("never iterated", max_tokens=10_000))
        gc.collect()
        await until(lambda: not backend.stats()["streams"])

        task = asyncio.create_task(collect(backend, ask("cancelled", max_tokens=10_000)))
        await until(lambda: backend.stats()["running"] == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        await until(lambda: not backend.stats()["streams"])

    play(counter, scenario)


def test_waiting_with_a_timeout_loses_nothing(counter: Any) -> None:
    slow(counter, 0.02)

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        tokens, timeouts = [], 0
        stream = backend.submit(ask("a"))
        while True:
            try:
                tokens.append(await asyncio.wait_for(anext(stream), 0.005))
            except TimeoutError:
                timeouts += 1
            except StopAsyncIteration:
                break
        assert len(tokens) == 5
        assert timeouts

    play(counter, scenario)


def test_abort_and_finish(counter: Any) -> None:
    slow(counter)

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        aborted = asyncio.create_task(collect(backend, ask("aborted", max_tokens=10_000, keep_state=True)))
        finished = asyncio.create_task(collect(backend, ask("finished", max_tokens=10_000, keep_state=True)))
        await until(lambda: backend.stats()["sampled_tokens"] >= 4)
        backend.abort("aborted")
        backend.finish("finished")
        backend.abort("unknown")
        last = (await aborted)[-1]
        assert (last.finish, last.result) == (FinishReason.ABORT, None)
        last = (await finished)[-1]
        assert last.finish is FinishReason.STOP
        assert last.result is not None

    play(counter, scenario)


def test_wrong_and_too_much_work_is_refused_at_once(counter: Any) -> None:
    slow(counter)

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        with pytest.raises(RequestError, match="no tokens"):
            backend.submit(Sequence("empty", [], SamplingParams(max_tokens=1)))
        with pytest.raises(ContextOverflow, match=r"n_prompt_tokens 3 \+ max_tokens 98 .* 100 tokens"):
            backend.submit(ask("long", max_tokens=98))
        streams = [backend.submit(ask(str(i), max_tokens=50)) for i in range(5)]
        with pytest.raises(RequestError, match="'0' is already running"):
            backend.submit(ask("0"))
        with pytest.raises(Overloaded, match="5 sequences"):
            backend.submit(ask("5"))
        for stream in streams:
            await stream.aclose()

    play(counter, scenario, max_context=100)


def test_drain_lets_the_short_end_and_aborts_the_long(counter: Any) -> None:
    slow(counter)

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        short = asyncio.create_task(collect(backend, ask("short")))
        long = asyncio.create_task(collect(backend, ask("long", max_tokens=10_000)))
        await until(lambda: backend.stats()["running"] == 2)
        draining = asyncio.create_task(backend.drain(0.3))
        await until(lambda: not backend.stats()["accepting"])
        with pytest.raises(Overloaded, match="shutting down"):
            backend.submit(ask("late"))
        await draining
        assert (await short)[-1].finish is FinishReason.LENGTH
        assert (await long)[-1].finish is FinishReason.ABORT

    play(counter, scenario)


def test_residents_and_eviction(counter: Any) -> None:
    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        prompt = [1] * 64
        (*_, last) = await collect(backend, ask("a", prompt, keep_state=True, cache_key=("t", "s", "1")))
        assert last.result is not None
        for version in ("1", "2", "3"):
            backend.retain(("t", "s", version), last.result.state)
        assert backend.resident(("t", "s", "1")) is None  # bounded
        assert backend.resident(("t", "s", "3")) is last.result.state
        assert backend.stats()["prefix_bytes"] > 0
        assert backend.evict(("t", "s")) == 2
        assert backend.resident(("t", "s", "3")) is None
        await until(lambda: backend.stats()["prefix_bytes"] == 0)

    play(counter, scenario, max_resident=2)


def test_engine_thread_flushes_denormals(counter: Any) -> None:
    seen: list[float] = []
    counter.register_forward_hook(lambda *_: seen.append(float(torch.tensor([1e-39]) * torch.tensor([1.0]))))

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        await collect(backend, ask("a"))

    play(counter, scenario)
    assert set(seen) == {0.0}


def test_failed_start_says_why(counter: Any) -> None:
    counter.crash = 0
    backend = NativeBackend(Engine(counter), model_id="m", fingerprint="f")

    async def main() -> None:
        with pytest.raises(Overloaded, match="not started"):
            backend.submit(ask("early"))
        with pytest.raises(RuntimeError, match="the model failed"):
            await backend.start()
        with pytest.raises(Overloaded, match="not started"):
            backend.submit(ask("late"))
        with pytest.raises(NestedError, match="started before"):
            await backend.start()
        await backend.drain(1)

    asyncio.run(main())


def test_broken_engine_tells_every_stream_and_takes_no_more_work(counter: Any, monkeypatch: Any) -> None:
    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        def broken() -> list[TokenEvent]:
            for name in list(engine._jobs):
                engine.abort(name)
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(engine, "step", broken)
        (last,) = await collect(backend, ask("a"))
        assert last.finish is FinishReason.ERROR
        assert "a bug" in str(last.error)
        with pytest.raises(Overloaded, match="the engine stopped"):
            backend.submit(ask("b"))

    play(counter, scenario)


def test_submitting_from_a_stream_consumer(counter: Any) -> None:
    """Ids may be reused as soon as the last event is there."""

    async def scenario(backend: NativeBackend, engine: Engine) -> None:
        replies = [[event.token for event in await collect(backend, ask("same"))] for _ in range(5)]
        assert replies == [replies[0]] * 5

    play(counter, scenario)


def test_updates_of_levels_are_observed(build_model: Any) -> None:
    """Time and norm of every update of a turn; those of the warm-up are nobody's."""
    seen: list[tuple[str, float]] = []
    engine = Engine(build_model("hope+sequential", torch.float64))
    backend = NativeBackend(engine, model_id="m", fingerprint="f")
    backend.observe = lambda name, value: seen.append((name, value))

    async def main() -> None:
        await backend.start()
        assert not seen
        await collect(backend, ask("a", list(range(1, 2 * engine.model.update_chunk + 2)), max_tokens=1))
        await backend.drain(5)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert sum(name == "update_seconds" for name, _ in seen) == engine.stats()["updates"] == 2
    norms = [value for name, value in seen if name == "update_norm"]
    assert norms
    assert all(value > 0 for _, value in seen)
