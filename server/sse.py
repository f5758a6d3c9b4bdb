"""Server-sent events: a response that ends its source when the client goes away, and keeps quiet connections open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "EventStream", "event", "until_disconnected"]

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends what `source` yields; closes it and runs `cleanup`, whatever happens, before the response is over."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        *,
        keep_alive: float = 10.0,
        cleanup: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._source = source
        self._keep_alive = keep_alive
        self._cleanup = cleanup
        self._sent = 0.0  # when the last event was, or comment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run until the source ends or the client disconnects."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(leaving)
            if not sending.done():
                await _end(sending)
            if self._cleanup is not None:  # a source that was never started runs no finally of its own
                await self._cleanup()
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._source):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            quiet = asyncio.create_task(self._keep_open(send))
            try:
                async for chunk in self._source:
                    self._sent = time.monotonic()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            finally:
                await _end(quiet)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_open(self, send: Send) -> None:
        """A comment whenever nothing was sent for `keep_alive` seconds."""
        self._sent = time.monotonic()
        while True:
            await asyncio.sleep(self._sent + self._keep_alive - time.monotonic())
            if time.monotonic() - self._sent >= self._keep_alive:
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None after cancelling it because the client has gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _end(leaving)
        if not working.done():
            await _end(working)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait({task})
