"""Every reply and every chunk against the models of the openai package: nothing missing, nothing of another type.

`strict` tells an int from a float-like string and a missing field from null. What the package's models do not know may
only stand under `session` (and vLLM's `prompt_logprobs`, where it is asked for).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter, ValidationError

OURS = {"session", "prompt_logprobs"}
NEVER_SENT_BY_OPENAI = {"max_model_len", "fingerprint"}  # vLLM's and ours, of a model card
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def surplus(value: object, where: str = "") -> Iterator[str]:
    """Fields the package's models do not know."""
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            if where or name not in OURS:
                yield f"{where}.{name}"
        for name in type(value).model_fields:
            yield from surplus(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from surplus(one, f"{where}.{number}")


def check(kind: type[BaseModel], body: bytes | str, known: Iterable[str] = ()) -> Any:
    made = kind.model_validate_json(body, strict=True)
    assert set(surplus(made)) <= {f".{name}" for name in known}
    return made


ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
MESSAGES = {"messages": [{"role": "user", "content": "Hello, Ada"}]}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"session_id": "strict"},
    {"n": 2},
    {"logprobs": True, "top_logprobs": 2},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stop": ["a", "e"]},
    {"session_id": "strict-key", "request_id": "k"},
    {"session_id": "strict-key", "request_id": "k"},
]


def events(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    lines = [line for line in reply.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [line.removeprefix("data: ") for line in lines[:-1]]


@pytest.mark.parametrize("variant", VARIANTS, ids=json.dumps)
def test_chat(client: httpx.Client, variant: dict[str, Any]) -> None:
    whole = {key: value for key, value in variant.items() if key != "stream_options"}
    check(ChatCompletion, client.post("/v1/chat/completions", json={**ASK, **MESSAGES, **whole}).content)
    named = {"session_id": f"{variant['session_id']}-stream"} if "session_id" in variant else {}
    stream = client.post("/v1/chat/completions", json={**ASK, **MESSAGES, **variant, **named, "stream": True})
    chunks = [check(ChatCompletionChunk, data) for data in events(stream)]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(ends) == variant.get("n", 1)
    if "stream_options" in variant:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens > 0


def patched(body: dict[str, Any]) -> str:
    """What OpenAI itself sends as null where the package's model, made for whole replies, knows no null.

    The finish_reason of a chunk that is not the last, and the likelihood of an echoed prompt's first token.
    """
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        logprobs = choice["logprobs"] or {}
        for name, value in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if logprobs.get(name) and logprobs[name][0] is None:
                logprobs[name][0] = value
    return json.dumps(body)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if "top_logprobs" not in v] + [{"logprobs": 2, "echo": True}], ids=json.dumps
)
def test_completions(client: httpx.Client, variant: dict[str, Any]) -> None:
    ask = {**ASK, "prompt": "Once", **variant}
    options = {"stream_options": ask.pop("stream_options")} if "stream_options" in ask else {}
    if "session_id" in ask:
        ask["session_id"] = f"raw-{ask['session_id']}"
    whole = client.post("/v1/completions", json=ask).json()
    assert all(choice["finish_reason"] for choice in whole["choices"])
    check(Completion, patched(whole))
    if "session_id" in ask:
        ask["session_id"] += "-stream"
    chunks = [
        json.loads(data) for data in events(client.post("/v1/completions", json={**ask, **options, "stream": True}))
    ]
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert len(ends) == variant.get("n", 1)
    for chunk in chunks:
        check(Completion, patched(chunk))


@pytest.mark.parametrize(
    "fields", [{}, {"session_id": "strict-responses"}, {"store": False, "instructions": "be kind"}]
)
def test_responses(client: httpx.Client, fields: dict[str, Any]) -> None:
    ask = {"model": "tiny", "max_output_tokens": 6, "temperature": 0, "input": "Hello", **fields}
    made = check(Response, client.post("/v1/responses", json=ask).content)
    if fields.get("store", True):
        check(Response, client.get(f"/v1/responses/{made.id}").content)
    stream = client.post("/v1/responses", json={**ask, "stream": True})
    seen = [STREAM_EVENT.validate_json(data, strict=True) for data in events(stream)]
    for event in seen:
        assert not set(surplus(event)) - {".response.session"}
    assert [event.sequence_number for event in seen] == list(range(len(seen)))


def test_models(client: httpx.Client) -> None:
    for card in client.get("/v1/models").json()["data"]:
        check(Model, json.dumps(card), known=NEVER_SENT_BY_OPENAI)


class Detail(BaseModel):
    """The error object of SERVING.md."""

    model_config = {"strict": True, "extra": "forbid"}

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What every refusal is."""

    model_config = {"strict": True, "extra": "forbid"}

    error: Detail


BAD: list[tuple[str, str, dict[str, Any], int]] = [
    ("POST", "/v1/chat/completions", {"content": b"{"}, 400),
    ("POST", "/v1/chat/completions", {"json": []}, 400),
    ("POST", "/v1/chat/completions", {"json": {**ASK}}, 400),
    ("POST", "/v1/chat/completions", {"json": {**ASK, **MESSAGES, "model": "no"}}, 404),
    ("POST", "/v1/chat/completions", {"json": {**ASK, **MESSAGES, "max_tokens": 10**6}}, 400),
    ("POST", "/v1/chat/completions", {"json": {**ASK, **MESSAGES, "stream": True, "max_tokens": 10**6}}, 400),
    ("POST", "/v1/chat/completions", {"json": {**ASK, **MESSAGES}, "headers": {"X-Session-ID": ""}}, 400),
    ("POST", "/v1/completions", {"json": {**ASK, "prompt": [9999]}}, 400),
    ("POST", "/v1/completions", {"json": {**ASK, "prompt": "x" * 4000}}, 400),
    ("GET", "/v1/chat/completions", {}, 405),
    ("GET", "/v1/sessions/absent", {}, 404),
    ("GET", "/v1/sessions?limit=0", {}, 400),
    ("POST", "/v1/sessions/absent/restore", {"json": {}}, 404),
    ("PUT", "/v1/sessions/absent/import", {"content": b"no safetensors"}, 422),
    ("GET", "/nowhere", {}, 404),
    ("POST", "/detokenize", {"json": {"tokens": [-1]}}, 400),
    ("GET", "/v1/models", {"headers": {"Authorization": "Bearer wrong"}}, 401),
    ("GET", "/admin/stats", {}, 401),
    ("POST", "/v1/chat/completions", {"content": b" " * (9 << 20)}, 413),
]


@pytest.mark.parametrize(("method", "path", "sent", "status"), BAD, ids=lambda value: str(value)[:40])
def test_errors(client: httpx.Client, method: str, path: str, sent: dict[str, Any], status: int) -> None:
    reply = client.request(method, path, **sent)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert Error.model_validate_json(reply.content).error.message


def test_the_check_would_see_a_fault(client: httpx.Client) -> None:
    """Of a good reply: a field left out, of another type, or added is found."""
    good = client.post("/v1/chat/completions", json={**ASK, **MESSAGES}).json()
    check(ChatCompletion, json.dumps(good))
    for broken in ({**good, "created": "0"}, {k: v for k, v in good.items() if k != "id"}, {**good, "choices": [{}]}):
        with pytest.raises(ValidationError):
            check(ChatCompletion, json.dumps(broken))
    with pytest.raises(AssertionError):
        check(ChatCompletion, json.dumps({**good, "surprise": 1}))
