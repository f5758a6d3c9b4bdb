"""The Responses API through the openai client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest


@pytest.fixture
def ai(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


GREEDY: dict[str, Any] = {"model": "tiny", "max_output_tokens": 12, "temperature": 0}


def test_previous_response_is_a_version(ai: openai.OpenAI, client: httpx.Client) -> None:
    one = ai.responses.create(input="my name is Ada", **GREEDY)
    assert one.output_text
    assert one.usage is not None
    two = ai.responses.create(input="who am I?", previous_response_id=one.id, **GREEDY)
    other = ai.responses.create(input="where am I?", previous_response_id=one.id, **GREEDY)
    again = ai.responses.create(input="who am I?", previous_response_id=one.id, **GREEDY)
    histories = [r.model_extra["session"]["history"] for r in (one, two, other, again) if r.model_extra]
    assert histories == ["new", "extended", "branched", "branched"]
    assert again.output_text == two.output_text
    assert ai.responses.retrieve(two.id).output_text == two.output_text
    items = list(ai.responses.input_items.list(two.id))
    assert [item.content[0].text for item in items] == ["who am I?"]  # type: ignore[union-attr,index]


def test_pages_of_input_items(ai: openai.OpenAI, client: httpx.Client) -> None:
    texts = [f"line {number}" for number in range(7)]
    one = ai.responses.create(input=[{"role": "user", "content": text} for text in texts], **GREEDY)
    for order, expected in (("asc", texts), ("desc", texts[::-1])):
        items = ai.responses.input_items.list(one.id, order=order, limit=3)  # the client asks for the next pages
        assert [item.content[0].text for item in items] == expected  # type: ignore[union-attr,index]
    last = client.get(f"/v1/responses/{one.id}/input_items", params={"limit": 7}).json()
    assert (len(last["data"]), last["has_more"]) == (7, False)
    after = client.get(f"/v1/responses/{one.id}/input_items", params={"after": last["last_id"]}).json()
    assert (after["data"], after["first_id"]) == ([], None)
    for wrong in ({"after": "nothing"}, {"limit": 0}, {"order": "up"}):
        assert client.get(f"/v1/responses/{one.id}/input_items", params=wrong).status_code == 400


def test_a_named_session(ai: openai.OpenAI, client: httpx.Client) -> None:
    named = {"X-Session-ID": "responder"}
    one = ai.responses.create(input="hi", instructions="be kind", extra_headers=named, **GREEDY)
    assert client.get("/v1/sessions/responder").json()["version"] == 1
    with pytest.raises(openai.ConflictError):
        ai.responses.delete(one.id)
    with pytest.raises(openai.BadRequestError):
        ai.responses.create(input="x", previous_response_id=one.id, extra_headers={"X-Session-ID": "else"}, **GREEDY)


def test_a_stream_of_events(ai: openai.OpenAI) -> None:
    whole = ai.responses.create(input="hello", store=False, **GREEDY)
    with ai.responses.create(input="hello", stream=True, **GREEDY) as stream:
        events = list(stream)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text


def test_a_response_that_is_not_stored_is_memoryless(ai: openai.OpenAI, client: httpx.Client) -> None:
    before = client.get("/v1/sessions").json()["data"]
    one = ai.responses.create(input="hello", store=False, **GREEDY)
    assert client.get("/v1/sessions").json()["data"] == before
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(one.id)


def test_a_retry_finds_what_was_stored(ai: openai.OpenAI) -> None:
    key = {"Idempotency-Key": "responses-1"}
    one = ai.responses.create(input="hello", extra_headers=key, **GREEDY)
    again = ai.responses.create(input="hello", extra_headers=key, **GREEDY)
    assert again.id == one.id
    with pytest.raises(openai.UnprocessableEntityError):
        ai.responses.create(input="other", extra_headers=key, **GREEDY)


def test_delete(ai: openai.OpenAI, client: httpx.Client) -> None:
    one = ai.responses.create(input="hello", **GREEDY)
    ai.responses.delete(one.id)
    for name in (one.id, "resp_x", "resp_" + "A" * 400, "nothing"):
        assert client.get(f"/v1/responses/{name}").status_code == 404
        assert client.delete(f"/v1/responses/{name}").status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input.0"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"max_output_tokens": 10**6}, "max_tokens"),
        ({"background": True}, "background"),
    ],
)
def test_bad_requests(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    reply = client.post("/v1/responses", json={"model": "tiny", "input": "a", **change})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields", [r'"user": "\ud800"', r'"metadata": {"\ud800": "x"}', r'"metadata": {"x": "\udfff"}']
)
def test_text_that_cannot_be_repeated(client: httpx.Client, fields: str) -> None:
    body = f'{{"model": "tiny", "input": "a", {fields}}}'
    reply = client.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert "surrogate" in reply.json()["error"]["message"] or "unicode" in reply.json()["error"]["message"]
