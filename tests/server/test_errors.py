"""Bad input: each a clear error in OpenAI's shape that names the field, and the server goes on serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Chat = Callable[..., httpx.Response]
MESSAGES = [{"role": "user", "content": "hi"}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["type"], str)
    return body["error"]


@pytest.mark.parametrize(
    ("change", "status", "param", "says"),
    [
        ({"model": "gpt-9"}, 404, None, "gpt-9"),
        ({"model": 7}, 400, "model", "7"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": "hi"}, 400, "messages", "list"),
        ({"messages": None}, 400, "messages", "list"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "null"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role", "wizard"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "tool"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages.0.content.0.type",
            "image_url",
        ),
        ({"temperature": "hot"}, 400, "temperature", "hot"),
        ({"temperature": 3}, 400, "temperature", "3"),
        ({"top_p": 0}, 400, "top_p", "0"),
        ({"max_tokens": "8"}, 400, "max_tokens", "8"),
        ({"max_tokens": -1}, 400, "max_tokens", "-1"),
        ({"max_tokens": 0}, 400, "max_tokens", "0"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "0"),
        ({"min_tokens": 9}, 400, "min_tokens", "9"),
        ({"max_tokens": 1_000_000}, 400, "max_tokens", "1000000"),
        ({"max_completion_tokens": 1_000_000}, 400, "max_tokens", "1000000"),
        ({"n": 0}, 400, "n", "0"),
        ({"stop": ""}, 400, "stop", "empty"),
        ({"stop": ["a"] * 17}, 400, "stop", "17"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "x"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias", "999999"),
        ({"stop_token_ids": [99999]}, 400, "stop_token_ids", "99999"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "tools"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "response_format"),
        ({"audio": {"voice": "x"}}, 400, "audio", "audio"),
        ({"session_id": "x" * 257}, 400, "session_id", "257"),
        ({"session_id": "a\nb"}, 400, "session_id", "control"),
        ({"session_id": ""}, 400, "session_id", "0 characters"),
        ({"session_id": 5}, 400, "session_id", "5"),
        ({"memory": {"learn": "some"}}, 400, "memory.learn", "some"),
        ({"memory": {"learned": "all"}}, 400, "memory.learned", "not permitted"),
        ({"request_id": ""}, 400, "Idempotency-Key", "0 characters"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_chat_request(
    client: httpx.Client, change: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    error = error_of(
        client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **change}),
        status,
    )
    assert error["param"] == param
    assert says in error["message"]
    assert client.get("/health").status_code == 200


def test_the_code_of_an_unknown_model_is_openais(client: httpx.Client) -> None:
    body = {"model": "gpt-9", "messages": MESSAGES}
    assert error_of(client.post("/v1/chat/completions", json=body), 404)["code"] == "model_not_found"
    assert error_of(client.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"{'model': 1}", b"null", b"[" * 100_000])
def test_a_malformed_body(client: httpx.Client, body: bytes) -> None:
    reply = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error_of(reply, 400)


def test_a_context_overflow_names_the_numbers(client: httpx.Client, chat: Chat) -> None:
    error = error_of(chat(client, "x" * 3000), 400)
    assert error["code"] == "context_length_exceeded"
    assert "n_prompt_tokens=3004" in error["message"]
    assert "2048" in error["message"]


def test_a_body_over_the_limit(client: httpx.Client) -> None:
    def pieces() -> Any:
        for _ in range(10):
            yield b" " * (1 << 20)

    error_of(client.post("/v1/chat/completions", content=b" " * (9 << 20)), 413)
    error_of(client.post("/v1/chat/completions", content=pieces()), 413)


def test_a_refused_turn_leaves_the_memory_alone(client: httpx.Client, chat: Chat) -> None:
    before = chat(client, "one", session="refused").json()["session"]
    assert chat(client, "x" * 3000, session="refused").status_code == 400
    assert chat(client, "two", session="refused", logit_bias={"999999": 1}).status_code == 400
    after = client.get("/v1/sessions/refused").json()
    assert (after["version"], after["digest"]) == (before["version"], before["digest"])


def test_an_error_before_a_stream_is_an_http_error(client: httpx.Client, chat: Chat) -> None:
    error_of(chat(client, "x" * 3000, stream=True), 400)
    error_of(chat(client, "x", stream=True, session="s", headers={"If-Match": "7"}), 409)


def test_unknown_routes_methods_and_parameters(client: httpx.Client) -> None:
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get("/v1/chat/completions"), 405)
    error_of(client.get("/v1/sessions?limit=0"), 400)
    error_of(client.get("/v1/sessions?cursor=zzz"), 400)
    error_of(client.get("/v1/sessions/absent"), 404)
    error_of(client.delete("/v1/sessions/absent"), 404)
    error_of(client.post("/v1/sessions/absent/reset"), 404)
    error_of(client.post("/v1/sessions/absent/restore", json={"version": 1}), 404)
    error_of(client.get(f"/v1/sessions/{'x' * 257}"), 400)
    error_of(client.get("/v1/sessions/a%00b"), 400)


def test_every_reply_has_a_request_id(client: httpx.Client) -> None:
    assert client.get("/health").headers["x-request-id"].startswith("req-")
    assert client.get("/v1/nothing", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/health", headers={"X-Request-Id": "x" * 200}).headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/sessions", "GET, POST"),
        ("/v1/sessions/x", "DELETE, GET"),
        ("/sessions/x", "DELETE, GET"),
        ("/health", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: httpx.Client, path: str, methods: str) -> None:
    reply = client.patch(path)
    assert error_of(reply, 405)["code"] == "method_not_allowed"
    assert reply.headers["allow"] == methods
