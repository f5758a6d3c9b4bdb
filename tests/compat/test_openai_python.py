"""openai-python as it is installed: every call it offers for what this server serves, and its automatic retries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from .conftest import TURNS, Reference, Server

ASK: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def named(session: str) -> dict[str, Any]:
    return {**ASK, "extra_headers": {"X-Session-ID": session}}


def version_of(client: httpx.Client, session: str) -> int:
    return int(client.get(f"/v1/sessions/{session}").json()["version"])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_conversation_whole_streamed_and_with_the_helper(
    ai: openai.OpenAI, client: httpx.Client, reference: Reference
) -> None:
    raw = ai.chat.completions.with_raw_response.create(messages=[user(TURNS[0])], **named("python"))
    assert raw.headers["x-session-version"] == "1"
    replies = [raw.parse().choices[0].message.content]
    chunks = ai.chat.completions.create(messages=[user(TURNS[1])], stream=True, **named("python"))
    replies.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    with ai.chat.completions.stream(messages=[user(TURNS[2])], **named("python")) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        with pytest.raises(openai.LengthFinishReasonError) as over:  # its way to say finish_reason "length"
            stream.get_final_completion()
    replies.append("".join(deltas))
    assert over.value.completion.choices[0].message.content == replies[-1]
    assert replies == reference.replies
    assert client.get("/v1/sessions/python").json()["digest"] == reference.digest


def test_the_helper_to_the_end(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(messages=[user("hello")], **ASK).choices[0].message.content
    assert whole is not None
    stop = whole[6:9]
    usage = {"include_usage": True}
    with ai.chat.completions.stream(messages=[user("hello")], stop=[stop], stream_options=usage, **ASK) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.done" in kinds
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == whole[: whole.index(stop)]
    assert final.usage is not None
    assert final.usage.completion_tokens > 0


def test_completions(ai: openai.OpenAI) -> None:
    one = ai.completions.create(prompt="Once upon", logprobs=1, echo=True, **ASK)
    assert one.choices[0].text.startswith("Once upon")
    assert one.choices[0].logprobs is not None
    assert one.choices[0].logprobs.token_logprobs is not None
    assert one.choices[0].logprobs.token_logprobs[0] is None
    assert one.usage is not None
    assert len(one.choices[0].logprobs.token_logprobs) == one.usage.total_tokens
    chunks = ai.completions.create(prompt="Once upon", stream=True, **ASK)
    assert "Once upon" + "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text


def test_responses(ai: openai.OpenAI, reference: Reference) -> None:
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
    one = ai.responses.create(input=TURNS[0], **ask)
    two = ai.responses.create(input=TURNS[1], previous_response_id=one.id, **ask)
    with ai.responses.stream(input=TURNS[2], previous_response_id=two.id, **ask) as stream:
        events = list(stream)
    assert (
        events[-1].type == "response.incomplete"
    )  # at max_output_tokens; get_final_response knows completed ones only
    three = events[-1].response
    assert [one.output_text, two.output_text, three.output_text] == reference.replies
    assert ai.responses.retrieve(two.id).output_text == two.output_text
    assert [item.role for item in ai.responses.input_items.list(two.id)] == ["user"]  # type: ignore[union-attr]
    alone = ai.responses.create(input=TURNS[0], store=False, **ask)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(alone.id)
    ai.responses.delete(ai.responses.create(input="hi", **ask).id)


def test_models_and_two_of_them(ai: openai.OpenAI, client: httpx.Client) -> None:
    assert [model.id for model in ai.models.list()] == ["tiny", "other"]
    assert ai.models.retrieve("other").owned_by == "nested-runtime"
    answers = [
        ai.chat.completions.create(messages=[user("hello")], **{**ASK, "model": model}).choices[0].message.content
        for model in ("tiny", "other")
    ]
    assert answers[0] != answers[1]
    ai.chat.completions.create(messages=[user("hello")], **{**named("of-other"), "model": "other"})
    with pytest.raises(openai.ConflictError) as conflict:  # a memory belongs to the model that made it
        ai.chat.completions.create(messages=[user("hello")], **named("of-other"))
    assert "other" in conflict.value.message
    assert version_of(client, "of-other") == 1


def test_errors_are_the_clients_own(server: Server, ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as absent:
        ai.models.retrieve("no-such-model")
    assert absent.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ai.chat.completions.create(messages=[user("x")], tools=[{"type": "function", "function": {"name": "f"}}], **ASK)
    assert bad.value.param == "tools"
    with server.openai(api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


class Dropping(ThreadingHTTPServer):
    """A proxy that lets the server finish its first answer and then hangs up on the client."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.seen = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Dropping

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        onward = HTTPConnection(self.server.upstream, timeout=120)
        onward.request("POST", self.path, body, dict(self.headers))
        reply = onward.getresponse()
        answer = reply.read()
        onward.close()
        with self.server.lock:
            self.server.seen += 1
            is_first = self.server.seen == 1
        self.close_connection = True
        if is_first:
            assert reply.status == 200
            return  # not a byte of it reaches the client
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def dropping(server: Server) -> Iterator[Callable[[], Dropping]]:
    made: list[Dropping] = []

    def start() -> Dropping:
        made.append(Dropping(server.url))
        threading.Thread(target=made[-1].serve_forever, daemon=True).start()
        return made[-1]

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", [None, "a-key"])
def test_an_automatic_retry_is_one_commit(
    server: Server, client: httpx.Client, dropping: Callable[[], Dropping], stream: bool, key: str | None
) -> None:
    """With the caller's key, and without one: then the client's own count of its retries says that it is one."""
    session = f"retry-{stream}-{key}"
    proxy = dropping()
    url = f"http://127.0.0.1:{proxy.server_port}/v1"
    ask = named(session)
    if key is not None:
        ask["extra_headers"]["Idempotency-Key"] = key
    with server.openai(base_url=url, max_retries=2) as ai:
        reply = ai.chat.completions.create(messages=[user(TURNS[0])], stream=stream, **ask)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            text = reply.choices[0].message.content
        assert proxy.seen == 2
        alone = client.post("/v1/chat/completions", json={**ASK, "messages": [user(TURNS[0])]}).json()
        assert text == alone["choices"][0]["message"]["content"]
        assert version_of(client, session) == 1
        ask["extra_headers"].pop("Idempotency-Key", None)
        ai.chat.completions.create(messages=[user(TURNS[0])], **ask)  # said again on purpose: not a retry
        assert version_of(client, session) == 2


def test_a_retry_after_something_else_happened_is_a_turn(server: Server, client: httpx.Client) -> None:
    """The stored answer is given again only while nothing has changed the session since."""
    first = {"X-Session-ID": "moved-on", "x-stainless-retry-count": "0"}
    again = {"X-Session-ID": "moved-on", "x-stainless-retry-count": "1"}
    one, two = ({**ASK, "messages": [user(text)]} for text in ("one", "two"))
    client.post("/v1/chat/completions", json=one, headers=first)
    client.post("/v1/chat/completions", json=two, headers=again)
    assert version_of(client, "moved-on") == 2  # another body
    client.post("/v1/chat/completions", json=one, headers=again)
    assert version_of(client, "moved-on") == 3  # the answer to `one` is no longer the newest
    client.post("/v1/chat/completions", json=one, headers=again)
    assert version_of(client, "moved-on") == 3
