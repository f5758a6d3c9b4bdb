"""Queueing for sessions inside one process, and calls that outlive a cancelled caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from nested_runtime.store.records import SessionKey

__all__ = ["Turnstile", "shielded"]

T = TypeVar("T")


class _Gate:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # FIFO
        self.freed = asyncio.Event()
        self.users = 0


class Turnstile:
    """Lets one waiter per session poll the store; the others queue behind it, first come first served."""

    def __init__(self) -> None:
        self._gates: dict[SessionKey, _Gate] = {}

    @asynccontextmanager
    async def enter(self, key: SessionKey, wait: float) -> AsyncIterator[asyncio.Event]:
        """Reach the front of the queue or raise TimeoutError. The event is set when this process frees the session."""
        gate = self._gates.setdefault(key, _Gate())
        gate.users += 1
        try:
            async with asyncio.timeout(wait):
                await gate.lock.acquire()
            try:
                yield gate.freed
            finally:
                gate.lock.release()
        finally:
            gate.users -= 1
            if not gate.users:
                del self._gates[key]

    def wake(self, key: SessionKey) -> None:
        """Tell the waiter at the front that the session was freed."""
        if key in self._gates:
            self._gates[key].freed.set()


async def shielded(call: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, Any]] | None = None) -> T:
    """Run `call` to its end even if the caller is cancelled; then `undo` its result, which nobody will use."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: _orphaned(done, undo))
        raise


_undoing: set[asyncio.Task[Any]] = set()  # the event loop holds tasks weakly


def _orphaned(task: asyncio.Future[T], undo: Callable[[T], Coroutine[Any, Any, Any]] | None) -> None:
    if task.cancelled() or task.exception() is not None or undo is None:
        return
    undoing = asyncio.ensure_future(undo(task.result()))
    _undoing.add(undoing)
    undoing.add_done_callback(_undoing.discard)
