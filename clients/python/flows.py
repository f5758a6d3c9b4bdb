"""API calls without I/O, as httpx writes its auth flows: a flow is a generator that asks and is answered.

A flow yields `Call` (answered with the response), `More` (answered with the next bytes of that response, `b""` at its
end), `Pause` (answered when the time has passed) or text for whoever reads the stream; it returns its result. Who runs
it, blocking or awaiting, is drivers.py's business, so every method of the SDK is written once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx

from .errors import APIError, ConnectionFailed, ProtocolError, api_error, stream_error

__all__ = ["Call", "Done", "EventDecoder", "Flow", "More", "Pause", "Step", "json_events", "request", "resume"]

T = TypeVar("T")

_REFUSED = frozenset({429, 503})  # nothing was done: any request may be sent again
_FAILED = frozenset({408, 500, 502, 504})  # something may have been done: only what is repeatable
_MAX_PAUSE = 30.0


@dataclass(frozen=True)
class Call:
    """One HTTP request. `stream` leaves the body of a good answer unread, for `More`."""

    method: str
    path: str
    json: Any = None
    content: bytes | None = None
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: bool = False

    @property
    def repeatable(self) -> bool:
        """True when the server does the work once however often it is asked."""
        return self.method in {"GET", "PUT", "DELETE"} or "Idempotency-Key" in self.headers


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class More:
    """Read on."""


@dataclass(frozen=True)
class Done(Generic[T]):
    """The flow has returned."""

    value: T


Step = Call | Pause | More | str
Flow = Generator[Step, Any, T]


def resume(flow: Flow[T], answer: Any = None, error: Exception | None = None) -> Step | Done[T]:
    """Answer a flow, or raise `error` where it waits; give its next step."""
    try:
        return flow.send(answer) if error is None else flow.throw(error)
    except StopIteration as stop:
        return Done(stop.value)


def request(call: Call, retries: int) -> Flow[httpx.Response]:
    """Send; try again what is worth it, as often as `retries` allows; raise what is not."""
    for attempt in range(retries + 1):
        try:
            response: httpx.Response = yield call
            if response.is_success:
                return response
            raise api_error(response)
        except ConnectionFailed as error:
            if attempt == retries or (error.sent and not call.repeatable):
                raise
            pause = None
        except APIError as error:
            if attempt == retries or not _worth_retrying(call, response):
                raise
            pause = error.retry_after
        backoff = min(_MAX_PAUSE, 0.25 * 2**attempt) * random.uniform(0.75, 1.25)
        yield Pause(backoff if pause is None else min(_MAX_PAUSE, pause))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _worth_retrying(call: Call, response: httpx.Response) -> bool:
    """The server's word in `x-should-retry` counts; else the status and what the request would do twice."""
    said = response.headers.get("x-should-retry")
    if said in {"true", "false"}:
        return bool(said == "true")
    return response.status_code in _REFUSED or (response.status_code in _FAILED and call.repeatable)


class EventDecoder:
    """Server-sent events from bytes cut anywhere. Comments (keep-alives) are skipped."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """Return the data of the events that are complete now."""
        *lines, self._buffer = (self._buffer + chunk).replace(b"\r\n", b"\n").split(b"\n")
        complete = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode())
            elif not line and self._data:
                complete.append("\n".join(self._data))
                self._data = []
        return complete


def json_events(chunk: bytes, decoder: EventDecoder) -> Iterator[dict[str, Any] | None]:
    """The events complete after `chunk` as JSON objects; None is `[DONE]`. An error event is raised."""
    for data in decoder.feed(chunk):
        if data == "[DONE]":
            yield None
            continue
        try:
            event = json.loads(data)
        except ValueError:
            raise ProtocolError(f"an event of the stream is not JSON: {data[:200]!r}") from None
        if not isinstance(event, dict):
            raise ProtocolError(f"an event of the stream is not an object: {data[:200]!r}")
        if isinstance(event.get("error"), dict):
            raise stream_error(event["error"])
        yield event
