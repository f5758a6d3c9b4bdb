"""POST /v1/chat/completions on the real app: replies, streams, memories."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai

Chat = Callable[..., httpx.Response]


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_memoryless_reply_has_no_session(client: httpx.Client, chat: Chat) -> None:
    reply = chat(client, "hello")
    assert text(reply)
    assert "session" not in reply.json()
    assert "x-session-version" not in reply.headers
    assert reply.json()["usage"]["completion_tokens"] == 8


def test_memoryless_is_the_same_before_and_after_traffic(client: httpx.Client, chat: Chat) -> None:
    before = chat(client, "what is my name?", max_tokens=32)
    for turn in range(6):
        chat(client, f"my name is {turn}", session=f"traffic-{turn % 2}")
    after = chat(client, "what is my name?", max_tokens=32)
    assert text(before).encode() == text(after).encode()


def test_a_session_remembers_and_counts(client: httpx.Client, chat: Chat) -> None:
    fresh = text(chat(client, "what is my name?", session="counts-fresh", max_tokens=24))
    first = chat(client, "my name is Ada", session="counts")
    second = chat(client, "what is my name?", session="counts", max_tokens=24)
    assert first.json()["session"]["version"] == 1
    assert second.json()["session"]["version"] == 2 == int(second.headers["x-session-version"])
    assert second.json()["session"]["learned_tokens"] > first.json()["session"]["learned_tokens"]
    assert text(second) != fresh
    assert second.json()["session"] == {
        "id": "counts",
        "version": 2,
        "learned_tokens": second.json()["session"]["learned_tokens"],
        "digest": client.get("/v1/sessions/counts").json()["digest"],
        "durability": "memory",
        "history": "new",
        "updates": 0,
        "updates_refused": 0,
    }


def test_the_body_names_a_session_too(client: httpx.Client, chat: Chat) -> None:
    assert chat(client, "hi", session_id="Zoë 1").json()["session"]["id"] == "Zoë 1"
    header = {"X-Session-ID": "Zoë 1".encode()}
    assert chat(client, "hi", headers=header).json()["session"]["version"] == 2
    clash = chat(client, "hi", session="a", session_id="b")
    assert clash.status_code == 400
    assert clash.json()["error"]["param"] == "session_id"


def test_a_stream_has_the_shape_clients_expect(client: httpx.Client, chat: Chat) -> None:
    whole = text(chat(client, "hello", max_tokens=24))
    reply = chat(client, "hello", session="stream", max_tokens=24, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events(reply)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == whole
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-2]["session"]["version"] == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    assert all(c["usage"] is None for c in chunks[:-1])
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)


def test_the_openai_client_talks_and_streams(server: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", default_headers={"X-Session-ID": "openai"})
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert reply.usage is not None
    assert reply.model_extra is not None
    assert reply.model_extra["session"]["version"] == 1
    assert reply.choices[0].logprobs is not None
    assert all(len(one.top_logprobs) == 2 for one in reply.choices[0].logprobs.content or [])
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "again"}], max_tokens=4, logit_bias={"4": -100}
    ) as stream:
        ended = [one for one in stream if one.type == "chunk"][-1].chunk
    assert ended.choices[0].finish_reason == "length"
    assert ended.model_extra is not None
    assert ended.model_extra["session"]["version"] == 2
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_stop_strings_across_token_borders(client: httpx.Client, chat: Chat) -> None:
    whole = text(chat(client, "tell me", max_tokens=40))
    stop = whole[6:9]  # every token is one byte, so the stop string spans three of them
    cut = chat(client, "tell me", max_tokens=40, stop=[stop, "never"])
    assert text(cut) == whole[: whole.index(stop)]
    assert cut.json()["choices"][0]["finish_reason"] == "stop"
    streamed = events(chat(client, "tell me", max_tokens=40, stop=stop, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed) == text(cut)


def test_what_was_held_back_arrives_when_no_stop_comes(client: httpx.Client, chat: Chat) -> None:
    whole = text(chat(client, "tell me", max_tokens=12))
    assert text(chat(client, "tell me", max_tokens=12, stop=whole[-2:] + "never")) == whole


def test_several_choices_share_a_prompt(client: httpx.Client, chat: Chat) -> None:
    reply = chat(client, "hello", n=3, temperature=1.0, seed=5, max_tokens=16)
    texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert len(set(texts)) == 3
    again = chat(client, "hello", n=3, temperature=1.0, seed=5, max_tokens=16)
    assert texts == [choice["message"]["content"] for choice in again.json()["choices"]]
    chunks = events(chat(client, "hello", n=3, temperature=1.0, seed=5, max_tokens=16, stream=True))
    streamed = ["", "", ""]
    for chunk in chunks:
        choice = chunk["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    assert chat(client, "hello", n=2, session="several").status_code == 400


def test_unknown_parameters_are_named_in_a_warning(client: httpx.Client, chat: Chat) -> None:
    reply = chat(client, "hello", frobnicate=1, zap="x")
    assert reply.status_code == 200
    assert "frobnicate, zap" in reply.headers["warning"]
    assert "warning" not in chat(client, "hello").headers


def test_learn_says_what_is_committed(client: httpx.Client, chat: Chat) -> None:
    first = chat(client, "one", session="learn").json()["session"]
    off = chat(client, "two", session="learn", memory={"learn": "off"}).json()["session"]
    assert (off["version"], off["digest"]) == (1, first["digest"])
    prompt = chat(client, "two", session="learn", memory={"learn": "prompt"}).json()
    assert prompt["session"]["version"] == 2
    assert prompt["session"]["learned_tokens"] == first["learned_tokens"] + prompt["usage"]["prompt_tokens"]
    assert client.get("/v1/sessions/learn").json()["version"] == 2
