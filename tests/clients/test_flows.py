"""The SDK without I/O: flows answered by hand, bytes cut anywhere."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.python import APIError, BadRequest, Conflict, ConnectionFailed, ProtocolError, RateLimited, ServerError
from clients.python.errors import api_error
from clients.python.flows import Call, Done, EventDecoder, Pause, json_events, request, resume

GET = Call("GET", "/v1/models")
TURN = Call("POST", "/v1/chat/completions", json={})
KEYED_TURN = Call("POST", "/v1/chat/completions", json={}, headers={"Idempotency-Key": "k"})


def answer(status: int, headers: dict[str, str] | None = None, error: dict[str, Any] | None = None) -> httpx.Response:
    body = {"error": error or {"message": f"status {status}", "code": None}} if status >= 400 else {}
    return httpx.Response(status, headers=headers, json=body, request=httpx.Request("GET", "http://server/"))


def test_a_good_answer_ends_the_request() -> None:
    flow = request(GET, retries=2)
    assert resume(flow) == GET
    done = resume(flow, answer(200))
    assert isinstance(done, Done)
    assert done.value.status_code == 200


@pytest.mark.parametrize("status", [429, 503])
def test_refused_for_now_is_asked_again_after_the_time_the_server_names(status: int) -> None:
    flow = request(TURN, retries=1)
    assert resume(flow) == TURN
    assert resume(flow, answer(status, {"Retry-After": "3"})) == Pause(3.0)
    assert resume(flow) == TURN
    with pytest.raises(RateLimited if status == 429 else ServerError):
        resume(flow, answer(status))


def test_a_pause_is_bounded() -> None:
    flow = request(TURN, retries=1)
    resume(flow)
    assert resume(flow, answer(503, {"Retry-After": "86400"})) == Pause(30.0)


@pytest.mark.parametrize("status", [408, 500, 502, 504])
def test_what_may_have_happened_is_only_repeated_under_a_key(status: int) -> None:
    flow = request(TURN, retries=2)
    resume(flow)
    with pytest.raises(APIError):
        resume(flow, answer(status))
    flow = request(KEYED_TURN, retries=2)
    resume(flow)
    assert isinstance(resume(flow, answer(status)), Pause)


def test_a_cut_connection_repeats_what_was_never_sent_or_has_a_key() -> None:
    flow = request(TURN, retries=2)
    resume(flow)
    with pytest.raises(ConnectionFailed):
        resume(flow, error=ConnectionFailed("cut"))
    for call, error in [(KEYED_TURN, ConnectionFailed("cut")), (TURN, ConnectionFailed("refused", sent=False))]:
        flow = request(call, retries=2)
        resume(flow)
        assert isinstance(resume(flow, error=error), Pause)
        assert resume(flow) == call


@pytest.mark.parametrize(("status", "kind"), [(400, BadRequest), (409, Conflict), (422, BadRequest)])
def test_a_refusal_is_final(status: int, kind: type[APIError]) -> None:
    flow = request(KEYED_TURN, retries=2)
    resume(flow)
    with pytest.raises(kind):
        resume(flow, answer(status))


def test_the_server_decides_with_x_should_retry() -> None:
    flow = request(KEYED_TURN, retries=2)
    resume(flow)
    with pytest.raises(ServerError):
        resume(flow, answer(503, {"x-should-retry": "false"}))
    flow = request(TURN, retries=2)
    resume(flow)
    assert isinstance(resume(flow, answer(409, {"x-should-retry": "true"})), Pause)


def test_backoff_grows() -> None:
    flow = request(GET, retries=6)
    pauses = []
    step = resume(flow)
    for _ in range(6):
        step = resume(flow, answer(500))
        assert isinstance(step, Pause)
        pauses.append(step.seconds)
        step = resume(flow)
    assert step == GET
    assert 0.18 < pauses[0] < 0.32
    assert pauses[-1] > 10 * pauses[0]


def test_an_error_keeps_what_the_server_said() -> None:
    error = api_error(
        answer(400, {"x-request-id": "r1"}, {"message": "too hot", "param": "temperature", "code": "invalid_value"})
    )
    assert (str(error), error.param, error.code, error.request_id) == (
        "too hot",
        "temperature",
        "invalid_value",
        "r1",
    )


def test_an_error_of_something_else_is_still_an_error() -> None:
    page = httpx.Response(502, text="<html>Bad gateway</html>", request=httpx.Request("GET", "http://proxy/x"))
    error = api_error(page)
    assert isinstance(error, ServerError)
    assert "502" in str(error)
    assert "Bad gateway" in str(error)


EVENTS = [{"text": "hällo"}, {"text": "a\nb", "n": [1, 2]}, {}]
STREAM = b": keep-alive\r\n\r\n" + b"".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n".encode() for e in EVENTS)
STREAM += b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_where_the_bytes_are_cut(cuts: list[int]) -> None:
    decoder = EventDecoder()
    edges = [0, *sorted(cuts), len(STREAM)]
    events = [e for a, b in pairwise(edges) for e in json_events(STREAM[a:b], decoder)]
    assert events == [*EVENTS, None]


def test_an_error_in_the_stream_is_raised() -> None:
    event = b'data: {"error": {"message": "the session moved on", "code": "version_conflict"}}\n\n'
    with pytest.raises(Conflict, match="moved on"):
        list(json_events(event, EventDecoder()))


@pytest.mark.parametrize("event", [b"data: {oops\n\n", b"data: [1]\n\n"])
def test_a_stream_of_something_else_is_refused(event: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(json_events(event, EventDecoder()))
