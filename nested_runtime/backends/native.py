"""NativeBackend: our engine on a thread of its own, bridged to asyncio.

The event loop side appends commands and reads queues. The engine thread runs all commands between two steps, then a
step, and wakes the event loop once per step with all its events.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from nested_runtime.core import FinishReason, Sequence, TokenEvent
from nested_runtime.engine.engine import Engine
from nested_runtime.errors import ContextOverflow, NestedError, Overloaded, RequestError
from nested_runtime.models.leveled import LeveledModel
from nested_runtime.models.replay import Consolidation, Replay
from nested_runtime.state.cache import StateCache

__all__ = ["Consolidated", "NativeBackend", "TokenStream"]

CHECK_SECONDS = 60.0
EventQueue = asyncio.Queue[TokenEvent]


class TokenStream(AsyncIterator[TokenEvent]):
    """The events of one sequence. Leave it with `aclose` (contextlib.aclosing) or by reading its last event.

    Cancelling a wait for the next event loses nothing, so keep-alives may use asyncio.wait_for.
    """

    def __init__(self, events: EventQueue, abort: Callable[[], None]) -> None:
        self._events = events
        self._abort = abort
        self._is_over = False

    async def __anext__(self) -> TokenEvent:
        if self._is_over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_over = event.finish is not None
        return event

    async def aclose(self) -> None:
        """Abort the sequence unless it is over. Safe to call twice."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._abort()


@dataclass(frozen=True)
class Consolidated:
    """A session's state after a consolidation, the tokens that were read again, the levels that learned."""

    state: Mapping[str, torch.Tensor]
    tokens: int
    levels: list[str]


class NativeBackend:
    """Backend over an Engine. All methods belong to the event loop it was started on, unless they say otherwise.

    fingerprint         of config + weights
    max_context         tokens one turn may read + write
    max_resident(_bytes)  bounds of the states that `retain` keeps in memory
    num_threads         torch threads of the engine thread
    observe             told name and value of every update of levels, by the engine thread; set it before start()
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model_id: str,
        fingerprint: str,
        max_context: int = 32768,
        max_resident: int = 64,
        max_resident_bytes: int = 1 << 30,
        num_threads: int = 1,
    ) -> None:
        self.model_id = model_id
        self.fingerprint = fingerprint
        self.max_context = max_context
        self.specs = engine.specs
        self.observe: Callable[[str, float], None] = lambda _name, _value: None
        self._engine = engine
        self._num_threads = num_threads
        self._residents = StateCache(max_resident_bytes, max_resident)
        self._queues: dict[str, EventQueue] = {}
        self._all_over = asyncio.Event()
        self._closed_because: str | None = "it is not started"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = False

    async def start(self) -> None:
        """Start the engine thread and run a few tokens through the model, so that the first user does not wait."""
        if self._thread is not None:
            raise NestedError("the backend was started before; make a new one to start again")
        self._loop = asyncio.get_running_loop()
        self._all_over.set()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="nested-engine", daemon=True)
        self._thread.start()
        await ready
        self._closed_because = None

    def submit(self, sequence: Sequence) -> TokenStream:
        """Queue a sequence; a sequence that cannot run is refused here, not in its events.

        RequestError, StateError: it is wrong; ContextOverflow: too long; Overloaded: full, draining or not started.
        """
        if self._closed_because is not None:
            raise Overloaded(f"the backend takes no work: {self._closed_because}; retry later", retry_after=5.0)
        self._check(sequence)
        sequence_id = sequence.id
        queue = self._queues[sequence_id] = asyncio.Queue()
        self._all_over.clear()
        self._post(lambda: self._submit(sequence))
        return TokenStream(queue, lambda: self.abort(sequence_id))

    def abort(self, sequence_id: str) -> None:
        """Stop a sequence at the next step; unknown ids are ignored. Safe from any thread."""
        self._post(lambda: self._engine.abort(sequence_id))

    def finish(self, sequence_id: str) -> None:
        """End a sequence well: no further token, its state is returned; unknown ids are ignored. Any thread."""
        self._post(lambda: self._engine.finish(sequence_id))

    async def drain(self, deadline: float) -> None:
        """Refuse new work, let running sequences end until `deadline` seconds from now, abort the rest, stop."""
        if self._thread is None:
            return
        self._closed_because = "it is shutting down"
        try:
            await asyncio.wait_for(self._all_over.wait(), deadline)
        except TimeoutError:
            for sequence_id in self._queues:
                self.abort(sequence_id)
            await self._all_over.wait()
        self._post(self._stop)
        await asyncio.to_thread(self._thread.join)

    def retain(self, key: tuple[str, ...], state: Mapping[str, torch.Tensor]) -> None:
        """Keep a session's state in memory under `key`, (tenant, session, version). Nobody may write to it later."""
        self._residents.put(key, state)

    def resident(self, key: tuple[str, ...]) -> Mapping[str, torch.Tensor] | None:
        """The state retained under `key`, if it is still there."""
        return self._residents.get(key)

    def evict(self, prefix: tuple[str, ...]) -> int:
        """Forget retained states and cached prefixes whose key starts with `prefix`; returns how many were retained."""
        self._post(lambda: self._engine.forget_prefixes(prefix))
        return self._residents.forget(prefix)

    async def cached(self) -> list[tuple[str, ...]]:
        """The keys of retained states and cached prefixes."""
        prefixes: list[tuple[str, ...]] = []
        await self._between_steps(lambda: prefixes.extend(self._engine.prefixes.states))
        return [*self._residents, *prefixes]

    async def check(self) -> list[str]:
        """Slot accounting, and whether every slot not in use is zero: one line per problem, empty = healthy."""
        try:
            await asyncio.wait_for(
                self._between_steps(lambda: self._engine.pool.check_integrity(deep=True)), CHECK_SECONDS
            )
        except TimeoutError:
            return [f"model {self.model_id!r}: its engine did not answer within {CHECK_SECONDS:g} s"]
        except NestedError as error:
            return [f"model {self.model_id!r}: {error}"]
        return []

    async def consolidate(
        self, state: Mapping[str, torch.Tensor], wanted: Consolidation, stop: Callable[[], bool]
    ) -> Consolidated | None:
        """Let slower levels learn a session's recent tokens: its state after that, None if `stop` said so meanwhile.

        The engine goes on: one piece, C_1 tokens, is read between two of its steps. UpdateDiverged: see Replay.
        """
        replay = Replay(cast(LeveledModel, self._engine.model), state, wanted)
        while not replay.is_over:
            if stop():
                return None
            await self._between_steps(replay.advance)
        return Consolidated(replay.result(), len(replay.tokens), replay.into_names)

    async def _between_steps(self, work: Callable[[], None]) -> None:
        """Run something on the engine thread, before its next step; raises what it raises."""
        if self._loop is None or self._closed_because is not None:
            raise Overloaded(f"model {self.model_id!r} takes no work: {self._closed_because}", retry_after=5.0)
        done: asyncio.Future[None] = self._loop.create_future()

        def run() -> None:
            error: Exception | None = None
            try:
                work()
            except Exception as caught:  # noqa: BLE001 - reported to who waits
                error = caught
            self._call(_resolve, done, error)

        self._post(run)
        await done

    def stats(self) -> dict[str, Any]:
        """Engine.stats() and: streams, residents, resident_bytes, accepting (bool)."""
        return {
            **self._engine.stats(),
            "streams": len(self._queues),
            "residents": len(self._residents),
            "resident_bytes": self._residents.num_bytes,
            "accepting": self._closed_because is None,
        }

    # ---- event loop side --------------------------------------------------------------------------------------------

    def _check(self, sequence: Sequence) -> None:
        if sequence.id in self._queues:
            raise RequestError(f"a sequence with id {sequence.id!r} is already running; ids must be unique", param="id")
        limit = self._engine.max_sequences
        if len(self._queues) >= limit:
            raise Overloaded(f"{limit} sequences are running or waiting already; retry later")
        num_prompt, num_output = len(sequence.prompt), sequence.params.max_tokens
        if num_prompt + num_output > self.max_context:
            raise ContextOverflow(
                f"n_prompt_tokens {num_prompt} + max_tokens {num_output} is over this server's limit of "
                f"{self.max_context} tokens a turn; shorten the prompt or max_tokens",
                param="max_tokens" if num_prompt < self.max_context else "messages",
            )
        self._engine.validate(sequence)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            queue = self._queues.get(event.sequence_id)
            if queue is not None:
                queue.put_nowait(event)
                if event.finish is not None:
                    del self._queues[event.sequence_id]
        if not self._queues:
            self._all_over.set()

    def _fail_all(self, error: Exception) -> None:
        self._closed_because = f"the engine stopped ({error!r})"
        failed = NestedError(f"the engine stopped: {error!r}; restart the server")
        self._deliver([TokenEvent(i, finish=FinishReason.ERROR, error=failed) for i in self._queues])

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # ---- engine thread ----------------------------------------------------------------------------------------------

    def _serve(self, ready: asyncio.Future[None]) -> None:
        torch.set_num_threads(self._num_threads)
        torch.set_flush_denormal(True)  # decayed memories are slow otherwise; a setting of this thread
        try:
            self._engine.warm_up()
        except Exception as error:  # noqa: BLE001 - reported to start()
            self._call(_resolve, ready, error)
            return
        self._engine.updates.observe = self.observe
        self._call(_resolve, ready, None)
        try:
            while self._run_commands():
                events = self._engine.step()
                if events:
                    self._call(self._deliver, events)
        except Exception as error:  # noqa: BLE001 - reported to every stream
            self._call(self._fail_all, error)

    def _run_commands(self) -> bool:
        """Wait for something to do, run all commands; False when the thread shall end."""
        with self._wake:
            self._wake.wait_for(lambda: self._commands or self._engine.has_work or self._stopping)
        while self._commands:
            self._commands.popleft()()
        return not self._stopping

    def _submit(self, sequence: Sequence) -> None:
        try:
            self._engine.submit(sequence)
        except NestedError as error:
            self._call(self._deliver, [TokenEvent(sequence.id, finish=FinishReason.ERROR, error=error)])

    def _stop(self) -> None:
        self._stopping = True

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Run `function` on the event loop."""
        if self._loop is None or self._loop.is_closed():
            self._stop()  # nobody is left to serve
        else:
            self._loop.call_soon_threadsafe(function, *arguments)


def _resolve(ready: asyncio.Future[None], error: Exception | None) -> None:
    if ready.done():  # start() was cancelled
        return
    if error is None:
        ready.set_result(None)
    else:
        ready.set_exception(error)
