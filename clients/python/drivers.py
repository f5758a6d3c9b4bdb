"""Run flows over httpx: `Blocking` with `httpx.Client`, `Awaiting` with `httpx.AsyncClient`.

The seam below is httpx's own, one method: pass `transport=` an `httpx.BaseTransport` or `httpx.AsyncBaseTransport` to
reach a server without a network.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import httpx

from .errors import ConnectionFailed, ProtocolError
from .flows import Call, Done, Flow, More, Pause, resume
from .types import Reply

__all__ = ["AsyncReplyStream", "Awaiting", "Blocking", "ReplyStream", "operation", "streaming"]

P = ParamSpec("P")
T = TypeVar("T")


class _Run(Generic[T]):
    """One flow in progress: its open response, its next bytes."""

    def __init__(self, http: httpx.Client, flow: Flow[T]) -> None:
        self._http = http
        self._flow = flow
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def advance(self) -> str | Done[T]:
        """Do what the flow asks until it has text to give or has returned."""
        step = resume(self._flow)
        while not isinstance(step, str | Done):
            try:
                answer = self._perform(step)
            except httpx.TransportError as error:
                step = resume(self._flow, error=_failure(error))
            else:
                step = resume(self._flow, answer)
        return step

    def _perform(self, step: Call | Pause | More) -> Any:
        match step:
            case Pause():
                return time.sleep(step.seconds)
            case More():
                return next(self._chunks, b"")
            case Call():
                self.close()
                response = self._response = self._http.send(_request(self._http, step), stream=True)
                if step.stream and response.is_success:
                    self._chunks = response.iter_bytes()
                else:
                    response.read()
                return response

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


class _AsyncRun(Generic[T]):
    """The same, awaiting."""

    def __init__(self, http: httpx.AsyncClient, flow: Flow[T]) -> None:
        self._http = http
        self._flow = flow
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def advance(self) -> str | Done[T]:
        step = resume(self._flow)
        while not isinstance(step, str | Done):
            try:
                answer = await self._perform(step)
            except httpx.TransportError as error:
                step = resume(self._flow, error=_failure(error))
            else:
                step = resume(self._flow, answer)
        return step

    async def _perform(self, step: Call | Pause | More) -> Any:
        match step:
            case Pause():
                return await asyncio.sleep(step.seconds)
            case More():
                return b"" if self._chunks is None else await anext(self._chunks, b"")
            case Call():
                await self.close()
                response = self._response = await self._http.send(_request(self._http, step), stream=True)
                if step.stream and response.is_success:
                    self._chunks = response.aiter_bytes()
                else:
                    await response.aread()
                return response

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()


class ReplyStream:
    """Iterate the text of a reply as it is written; `reply` is the whole once the iteration has ended.

    Leaving early (`close`, or the end of a `with`) tells the server to stop: the turn is not committed.
    """

    def __init__(self, http: httpx.Client, flow: Flow[Reply]) -> None:
        self._run = _Run(http, flow)
        self._reply: Reply | None = None

    @property
    def reply(self) -> Reply:
        """The finished reply with its session version."""
        return _finished(self._reply)

    def __iter__(self) -> Iterator[str]:
        try:
            while not isinstance(step := self._run.advance(), Done):
                yield step
            self._reply = step.value
        finally:
            self.close()

    def close(self) -> None:
        """Hang up."""
        self._run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncReplyStream:
    """As `ReplyStream`, for `async for`."""

    def __init__(self, http: httpx.AsyncClient, flow: Flow[Reply]) -> None:
        self._run = _AsyncRun(http, flow)
        self._reply: Reply | None = None

    @property
    def reply(self) -> Reply:
        """The finished reply with its session version."""
        return _finished(self._reply)

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            while not isinstance(step := await self._run.advance(), Done):
                yield step
            self._reply = step.value
        finally:
            await self.close()

    async def close(self) -> None:
        """Hang up."""
        await self._run.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Blocking:
    """Its operations block and return."""

    _http: httpx.Client

    def _finish(self, flow: Flow[T]) -> T:
        run = _Run(self._http, flow)
        try:
            while not isinstance(step := run.advance(), Done):
                pass
            return step.value
        finally:
            run.close()


class Awaiting:
    """Its operations are awaited."""

    _http: httpx.AsyncClient

    async def _finish(self, flow: Flow[T]) -> T:
        run = _AsyncRun(self._http, flow)
        try:
            while not isinstance(step := await run.advance(), Done):
                pass
            return step.value
        finally:
            await run.close()


class operation(Generic[P, T]):  # noqa: N801 - a decorator
    """A method written as a flow: `T` on a `Blocking` object, awaitable `T` on an `Awaiting` one."""

    def __init__(self, flow: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self.flow = flow
        self.__doc__ = flow.__doc__

    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, instance: Awaiting, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        """Bind, as functions do."""
        if instance is None:
            return self
        return lambda *args, **kwargs: instance._finish(self.flow(instance, *args, **kwargs))


class streaming(Generic[P]):  # noqa: N801 - a decorator
    """A method written as a flow that gives text on its way to a `Reply`."""

    def __init__(self, flow: Callable[Concatenate[Any, P], Flow[Reply]]) -> None:
        self.flow = flow
        self.__doc__ = flow.__doc__

    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, ReplyStream]: ...
    @overload
    def __get__(self, instance: Awaiting, owner: type) -> Callable[P, AsyncReplyStream]: ...
    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        """Bind, as functions do."""
        if instance is None:
            return self
        stream = ReplyStream if isinstance(instance, Blocking) else AsyncReplyStream
        return lambda *args, **kwargs: stream(instance._http, self.flow(instance, *args, **kwargs))


def _request(http: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
    return http.build_request(
        call.method,
        call.path,
        json=call.json,
        content=call.content,
        params=dict(call.params) or None,
        headers=dict(call.headers),
    )


def _failure(error: httpx.TransportError) -> ConnectionFailed:
    sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    kind = "no answer in time" if isinstance(error, httpx.TimeoutException) else "no answer"
    try:
        url = str(error.request.url)
    except RuntimeError:  # httpx knows of no request
        url = "the server"
    return ConnectionFailed(
        f"{kind} from {url}: {str(error) or type(error).__name__}; is the server running?", sent=sent
    )


def _finished(reply: Reply | None) -> Reply:
    if reply is None:
        raise ProtocolError("the reply is not complete: iterate the stream to its end first")
    return reply
