"""Turns that are repeated, refused, cut or interrupted: the memory is at version N or N+1, never anything else."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from nested_runtime.store.base import SessionKey

Chat = Callable[..., httpx.Response]


def version_of(client: httpx.Client, session: str) -> int:
    return int(client.get(f"/v1/sessions/{session}").json()["version"])


@pytest.mark.parametrize("how", ["header", "body"])
def test_the_same_key_gives_the_same_answer_and_one_commit(client: httpx.Client, chat: Chat, how: str) -> None:
    name = f"key-{how}"
    key: dict[str, Any] = {"headers": {"Idempotency-Key": "k1"}} if how == "header" else {"request_id": "k1"}
    first = chat(client, "one", session=name, **key)
    again = chat(client, "one", session=name, **key)
    assert again.json() == first.json()
    assert again.headers["x-session-version"] == "1"
    assert version_of(client, name) == 1
    other = chat(client, "another", session=name, **key)
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert chat(client, "one", session=f"{name}-2", **key).json()["id"] != first.json()["id"]


def test_a_stream_is_replayed_too(client: httpx.Client, chat: Chat) -> None:
    ask = {"headers": {"Idempotency-Key": "k"}, "stream": True, "session": "replay"}
    first, again = chat(client, "one", **ask), chat(client, "one", **ask)

    def text(reply: httpx.Response) -> str:
        chunks = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]
        return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

    assert text(first) == text(again) != ""
    assert again.text.endswith("data: [DONE]\n\n")
    assert version_of(client, "replay") == 1


def test_a_memoryless_answer_is_replayed(client: httpx.Client, chat: Chat) -> None:
    ask = {"headers": {"Idempotency-Key": "memoryless"}, "temperature": 1.0}
    first = chat(client, "one", **ask)
    assert chat(client, "one", **ask).json() == first.json()
    assert chat(client, "two", **ask).status_code == 422


def test_a_key_that_is_still_running_is_a_conflict(server: Any, client: httpx.Client, chat: Chat) -> None:
    ask = {"session": "running", "headers": {"Idempotency-Key": "slow"}, "max_tokens": 600}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(chat, client, "slow", **ask)
        server.wait_until_running()
        conflict = chat(client, "slow", **ask)
        assert conflict.status_code == 409
        assert conflict.headers["x-should-retry"] == "false"
        assert slow.result().status_code == 200
    assert chat(client, "slow", **ask).json() == slow.result().json()


def test_if_match(client: httpx.Client, chat: Chat) -> None:
    assert chat(client, "one", session="match", headers={"If-Match": "0"}).status_code == 200
    stale = chat(client, "two", session="match", headers={"If-Match": "0"})
    assert stale.status_code == 409
    assert stale.json()["error"]["code"] == "version_conflict"
    assert chat(client, "two", session="match", headers={"If-Match": '"1"'}).status_code == 200
    assert chat(client, "two", session="match", headers={"If-Match": "one"}).status_code == 400
    assert client.post("/v1/sessions/match/reset", headers={"If-Match": "1"}).status_code == 409
    assert client.delete("/v1/sessions/match", headers={"If-Match": "1"}).status_code == 409
    assert version_of(client, "match") == 2


ENDLESS = 200_000  # tokens: minutes on any machine


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_teaches_nothing(
    settings: Callable[..., Any], serve: Any, chat: Chat, stream: bool
) -> None:
    """An aborted turn frees slot and session: the next one would otherwise wait until the endless one is over."""
    roomy = settings(engine={"max_context": ENDLESS + 1000}, sessions={"wait_seconds": 100})
    with serve(roomy) as server, server.client() as client:
        before = chat(client, "one", session="leaves").json()["session"]
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "two"}], "max_tokens": ENDLESS}
        ask |= {"stream": stream, "session_id": "leaves", "ignore_eos": True}
        body = json.dumps(ask).encode()
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port)) as leaving:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            server.wait_until_running()
            if stream:
                assert leaving.recv(4096)
        after = chat(client, "two", session="leaves")
        assert after.status_code == 200, after.text
        assert after.json()["session"]["version"] == before["version"] + 1
        assert after.json()["session"]["learned_tokens"] < 200
        while server.service.runtime.models["tiny"].backend.stats()["running"]:
            time.sleep(0.01)


def test_turns_of_one_session_queue(client: httpx.Client, chat: Chat) -> None:
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda i: chat(client, f"turn {i}", session="queue"), range(4)))
    assert sorted(reply.json()["session"]["version"] for reply in replies) == [1, 2, 3, 4]


def test_too_many_waiting_turns_are_refused(settings: Callable[..., Any], serve: Any, chat: Chat) -> None:
    with serve(settings(sessions={"waiting": 1, "wait_seconds": 10})) as server, server.client() as client:
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda i: chat(client, f"{i}", session="s", max_tokens=100), range(6)))
        codes = [reply.status_code for reply in replies]
        assert 200 in codes
        assert 409 in codes
        refused = next(reply for reply in replies if reply.status_code == 409)
        assert refused.json()["error"]["code"] == "session_busy"
        assert version_of(client, "s") == codes.count(200)


def test_batched_is_solo(client: httpx.Client, chat: Chat) -> None:
    alone = [chat(client, f"fact {i}", session=f"solo-{i}", max_tokens=20).json() for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda i: chat(client, f"fact {i}", session=f"crowd-{i}", max_tokens=20).json(), range(4))
        )
    for one, other in zip(alone, together, strict=True):
        assert one["choices"] == other["choices"]


def test_a_lost_lease_is_a_conflict_and_commits_nothing(server: Any, client: httpx.Client, chat: Chat) -> None:
    chat(client, "one", session="lost")
    key = SessionKey("default", "lost")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(chat, client, "two", session="lost", max_tokens=600)
        server.wait_until_running()
        server.run(server.service.store.delete(key))
        refused = slow.result()
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "lease_lost"
    assert client.get("/v1/sessions/lost").status_code == 404


def test_a_store_that_is_down(settings: Callable[..., Any], serve: Any, chat: Chat, monkeypatch: Any) -> None:
    from nested_runtime.errors import StoreUnavailable

    with serve(settings()) as server, server.client() as client:
        before = chat(client, "one")

        async def down(*_: object, **__: object) -> None:
            raise StoreUnavailable("the store does not answer; start it")

        for name in ("ping", "versions", "_try_lease", "info"):
            monkeypatch.setattr(server.service.store, name, down)
        refused = chat(client, "one", session="down")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert chat(client, "one").json()["choices"] == before.json()["choices"]
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200


def test_sigkill_and_resume_on_sqlite(
    client: httpx.Client, model_folder: Path, tmp_path: Path, process: Any, chat: Chat
) -> None:
    arguments = ("--model", str(model_folder), "--data-dir", str(tmp_path))
    server = process(*arguments)
    with server.client() as http:
        chat(http, "my name is Ada", session="alice")
        taught = chat(http, "I live in Rome", session="alice").json()["session"]
        assert taught["durability"] in ("memory", "fsynced")
        chat(http, "I live in Rome", session="bob")
    server.stop(signal.SIGKILL)
    server = process(*arguments)
    with server.client() as http:
        assert http.get("/v1/sessions/alice").json()["digest"] == taught["digest"]
        resumed = chat(http, "who am I?", session="alice", max_tokens=24)
        assert resumed.json()["session"]["version"] == 3
    chat(client, "my name is Ada", session="unbroken")
    chat(client, "I live in Rome", session="unbroken")
    unbroken = chat(client, "who am I?", session="unbroken", max_tokens=24)
    assert unbroken.json()["choices"] == resumed.json()["choices"]
    assert unbroken.json()["session"]["digest"] == resumed.json()["session"]["digest"]


def test_sigterm_lets_a_running_turn_finish(
    settings: Callable[..., Any], serve: Any, model_folder: Path, tmp_path: Path, process: Any
) -> None:
    server = process("--model", str(model_folder), "--data-dir", str(tmp_path), "--drain-seconds", "120")
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "slow"}], "max_tokens": 1000, "stream": True}
    ask |= {"session_id": "s", "ignore_eos": True}
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=ask) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        assert "finish_reason" in next(lines)
        server.send(signal.SIGTERM)  # the turn has begun, and most of it is still to come
        rest = [line.removeprefix("data: ") for line in lines]
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["session"]["version"] == 1
    assert server.wait(120) == 0
    with serve(settings(store=None, data_dir=tmp_path)) as again, again.client() as client:
        assert version_of(client, "s") == 1


def test_sigterm_gives_notice_and_serves_on(model_folder: Path, process: Any, chat: Chat) -> None:
    """While a proxy finds out, new connections and turns are served; a second SIGTERM ends the notice."""
    server = process("--model", str(model_folder), "--store", "memory:", "--notice-seconds", "300")
    with server.client() as client:
        assert client.get("/ready").status_code == 200
        server.send(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while client.get("/ready").status_code != 503:
            assert time.monotonic() < deadline
    with server.client() as client:
        assert chat(client, "hello", session="s").json()["session"]["version"] == 1
        assert client.get("/ready").json()["server"] == "starting or shutting down"
        server.send(signal.SIGTERM)
    assert server.wait(60) == 0
