"""Exchange: a generating request from turns to HTTP, whole or as a stream, once per idempotency key."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import orjson
from fastapi import Request
from fastapi.responses import Response

from nested_runtime.errors import Conflict, NestedError, RequestError
from nested_runtime.sessions import Answer, Delta, Finished, Runtime, Started, Turn
from nested_runtime.store.base import SessionKey

from .deps import Caller, Service
from .errors import body_of, status_of
from .schemas.common import Generation
from .sse import DONE, EventStream, event, until_disconnected

__all__ = ["Chunks", "Exchange", "run_all"]

Event = Started | Delta | Finished
RETRY_COUNT = "x-stainless-retry-count"  # sent by OpenAI's clients, which send no Idempotency-Key
UNNAMED = "automatic"  # the answers to their requests, by version


class Chunks(Protocol):
    """How one API writes a stream: lists of event bodies."""

    def start(self, index: int) -> list[dict[str, Any]]:
        """When a choice begins."""

    def delta(self, index: int, delta: Delta, usage: dict[str, Any] | None) -> list[dict[str, Any]]:
        """When text or tokens have come."""

    def end(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        """When a choice is over and its memory durable."""

    def last(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        """When all choices are over and usage was asked for."""

    def replay(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A stored reply."""


async def run_all(runtime: Runtime, turns: Sequence[Turn]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all turns as they come, with the turn's index. Closing it aborts them all."""
    if len(turns) == 1:
        async with aclosing(runtime.run_turn(turns[0])) as events:
            async for one in events:
                yield 0, one
        return
    queue: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue(64)
    tasks = [asyncio.create_task(_pump(runtime, index, turn, queue)) for index, turn in enumerate(turns)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    runtime: Runtime, index: int, turn: Turn, queue: asyncio.Queue[tuple[int, Event] | BaseException | None]
) -> None:
    try:
        async with aclosing(runtime.run_turn(turn)) as events:
            async for one in events:
                await queue.put((index, one))
        await queue.put(None)
    except Exception as error:  # noqa: BLE001 - raised again by run_all
        await queue.put(error)


@dataclass
class Exchange:
    """One generating request. `build` makes the whole reply's body, `chunks` the stream's."""

    service: Service
    caller: Caller
    request: Request
    body: Generation
    session: SessionKey | None
    build: Callable[[Sequence[Finished]], dict[str, Any]]
    chunks: Chunks
    event_names: bool = False  # the Responses API names its events
    answer_key: str | None = None  # store the answer under this key, whether the caller sent one or not
    wrap: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: body  # what is stored of a body
    unwrap: Callable[[dict[str, Any]], dict[str, Any]] = lambda stored: stored  # its inverse
    began: float = field(default_factory=time.perf_counter)

    async def answer(self, turns: Sequence[Turn]) -> Response:
        """Run the turns and reply."""
        self.service.admit()
        key, digest = await self._idempotency()
        learns = self.session is not None and self.body.memory.learn != "off"
        cached = None
        if key is not None and learns:
            turns = [replace(turns[0], answer=Answer(key, digest, self._rendered))]
        elif learns and self._attempt is not None:
            turns = [replace(turns[0], answer=Answer(UNNAMED, digest, self._rendered, self._attempt))]
        elif key is not None:
            cached = self.service.answers.begin(self.caller.tenant, key, digest)
        if cached is not None:
            return self._replayed(cached)
        remember = (key, digest) if key is not None and not learns else None
        events = run_all(self.service.runtime, turns)
        try:
            return await self._reply(events, len(turns), remember)
        except BaseException:
            self._remember(remember, None)
            raise

    def _rendered(self, finished: Finished) -> bytes:
        return orjson.dumps(self.wrap(self.build([finished])))

    async def _reply(
        self, events: AsyncGenerator[tuple[int, Event], None], count: int, remember: tuple[str, str] | None
    ) -> Response:
        if self.body.stream:
            first = await until_disconnected(self.request.receive, _first(events))
            if first is None:
                raise ClientGone
            if isinstance(first[1], Finished) and first[1].replayed is not None:
                await events.aclose()
                return self._replayed(first[1].replayed)
            source = self._stream(first, events, count, remember)

            async def cleanup() -> None:
                await events.aclose()
                self._remember(remember, None)

            keep_alive = self.service.settings.keep_alive
            return EventStream(source, self.headers(), keep_alive=keep_alive, cleanup=cleanup)
        finished = await until_disconnected(self.request.receive, self._collect(events, count))
        if finished is None:
            raise ClientGone
        if finished[0].replayed is not None:
            return self._replayed(finished[0].replayed)
        body = self.build(finished)
        data = orjson.dumps(body)
        self._remember(remember, data)
        return _json(data, {**self.headers(), **_version(body)})

    async def _collect(self, events: AsyncGenerator[tuple[int, Event], None], count: int) -> list[Finished]:
        finished: dict[int, Finished] = {}
        async with aclosing(events):
            clock = self._clock()
            async for index, one in events:
                clock(one)
                if isinstance(one, Finished):
                    finished[index] = one
        return [finished[index] for index in range(count)]

    async def _stream(
        self,
        first: tuple[int, Event],
        events: AsyncGenerator[tuple[int, Event], None],
        count: int,
        remember: tuple[str, str] | None,
    ) -> AsyncGenerator[bytes, None]:
        finished: dict[int, Finished] = {}
        data: bytes | None = None
        try:
            async with aclosing(events):
                clock = self._clock()
                for body in self._written(*first, finished):
                    yield self._event(body)
                async for index, one in events:
                    clock(one)
                    for body in self._written(index, one, finished):
                        yield self._event(body)
            ordered = [finished[index] for index in range(count)]
            data = orjson.dumps(self.build(ordered))
            options = self.body.stream_options
            if options is not None and options.include_usage:
                for body in self.chunks.last(ordered):
                    yield self._event(body)
        except Exception as error:
            if status_of(error) == 500 and not isinstance(error, NestedError):
                raise  # logged by the server; the connection ends without [DONE]
            yield event(body_of(error))
        finally:
            self._remember(remember, data)
        yield DONE

    def _written(self, index: int, one: Event, finished: dict[int, Finished]) -> list[dict[str, Any]]:
        if isinstance(one, Started):
            self._sampled, self._prompt_tokens = 0, one.prompt_tokens
            return self.chunks.start(index)
        if isinstance(one, Finished):
            finished[index] = one
            return self.chunks.end(index, one)
        self._sampled += len(one.tokens)
        return self.chunks.delta(index, one, self._usage_so_far())

    def _usage_so_far(self) -> dict[str, Any] | None:
        options = self.body.stream_options
        if options is None or not options.continuous_usage_stats:
            return None
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._sampled,
            "total_tokens": self._prompt_tokens + self._sampled,
        }

    def _event(self, body: dict[str, Any]) -> bytes:
        return event(body, body["type"] if self.event_names else None)

    def _clock(self) -> Callable[[Event], None]:
        """Latency metrics of this request."""
        metrics, tracing, model = self.service.metrics, self.service.tracing, self.body.model
        last = 0.0

        def clock(one: Event) -> None:
            nonlocal last
            now = time.perf_counter()
            if isinstance(one, Finished):
                metrics.whole.labels(model).observe(now - self.began)
            elif isinstance(one, Delta) and one.tokens:
                if not last:
                    tracing.event("first token")
                histogram = metrics.between_tokens if last else metrics.first_token
                histogram.labels(model).observe(now - (last or self.began))
                last = now

        return clock

    async def _idempotency(self) -> tuple[str | None, str]:
        """The caller's key (header Idempotency-Key or body request_id) and the digest of what was asked."""
        key = self.request.headers.get("idempotency-key", self.body.request_id)
        if key is None and self.answer_key is None:
            return None, "" if self._attempt is None else await self._asked()
        if key is not None and (not 1 <= len(key) <= 256 or not key.isprintable()):
            raise RequestError(
                f"Idempotency-Key has {len(key)} characters, some perhaps unprintable; send 1 to 256 printable ones",
                param="Idempotency-Key",
            )
        return self.answer_key or key, await self._asked()

    async def _asked(self) -> str:
        """Digest of path and body."""
        path = self.request.url.path.removeprefix("/v1")
        return hashlib.sha256(path.encode() + b"\n" + await self.request.body()).hexdigest()

    @property
    def _attempt(self) -> int | None:
        """How often an OpenAI client has tried this request before, by itself; None = the client does not say."""
        text = self.request.headers.get(RETRY_COUNT, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else None

    def _remember(self, remember: tuple[str, str] | None, data: bytes | None) -> None:
        if remember is not None:
            self.service.answers.end(self.caller.tenant, *remember, data)

    def _replayed(self, data: bytes) -> Response:
        body = self.unwrap(orjson.loads(data))
        headers = {**self.headers(), **_version(body), "Idempotent-Replay": "true"}
        if not self.body.stream:
            return _json(orjson.dumps(body), headers)
        return EventStream(self._replay(body), headers)

    async def _replay(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        for one in self.chunks.replay(body):
            yield self._event(one)
        yield DONE

    def headers(self) -> dict[str, str]:
        """Headers of every reply: what was ignored."""
        unknown = [name for name in self.body.unknown() if name not in self.body.UNSUPPORTED]
        if not unknown:
            return {}
        names = ", ".join(name.encode("ascii", "replace").decode() for name in unknown)[:512]
        printable = "".join(char if char.isprintable() and char not in '"\\' else "?" for char in names)
        return {"Warning": f'299 nested "ignored unknown parameters: {printable}"'}


class ClientGone(Conflict):
    """The client disconnected; nobody reads this."""

    code = "client_gone"


async def _first(events: AsyncGenerator[tuple[int, Event], None]) -> tuple[int, Event]:
    return await anext(events)


def _json(data: bytes, headers: dict[str, str]) -> Response:
    return Response(data, media_type="application/json", headers=headers)


def _version(body: dict[str, Any]) -> dict[str, str]:
    session = body.get("session")
    return {"X-Session-Version": str(session["version"])} if session else {}
