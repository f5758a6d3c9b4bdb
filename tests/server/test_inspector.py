"""What the inspector shows: levels of any kept version, how far they moved, surprise per token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Chat = Callable[..., httpx.Response]
SURPRISE = {"memory": {"surprise": True}}


def levels(client: httpx.Client, name: str, version: int | None = None) -> dict[str, Any]:
    reply = client.get(f"/v1/sessions/{name}/levels", params={"version": version} if version else {})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    return {**body, **{one["level"]: one for one in body["data"]}}


def test_levels_of_every_kept_version(client: httpx.Client, chat: Chat) -> None:
    for text in ("my name is Ada", "I live in Rome", "I like tea"):
        chat(client, text, session="look")
    found = [levels(client, "look", number) for number in (1, 2, 3)]
    assert [one["version"] for one in found] == [1, 2, 3]
    assert levels(client, "look") == found[2]
    assert len({one["fast"]["norm"] for one in found}) == 3
    assert found[0]["fast"]["change"] == pytest.approx(found[0]["fast"]["norm"])  # it came from nothing
    for one in found:
        level = one["fast"]
        assert level["updates"] is None  # it learns from every token
        assert [part["name"] for part in level["parts"]] == ["blocks.0", "blocks.1"]
        for name in ("norm", "change"):
            assert level[name] == pytest.approx(sum(part[name] ** 2 for part in level["parts"]) ** 0.5)
    assert found[1]["fast"]["change"] >= abs(found[1]["fast"]["norm"] - found[0]["fast"]["norm"])
    assert client.get("/v1/sessions/look/levels", params={"version": 9}).status_code == 404
    assert client.get("/v1/sessions/look/levels", params={"version": 0}).status_code == 400


def test_change_is_from_the_version_it_was_made_from(client: httpx.Client, chat: Chat) -> None:
    for text in ("my name is Ada", "I live in Rome"):
        chat(client, text, session="moved")
    client.post("/v1/sessions/moved/restore", json={"version": 1})
    assert levels(client, "moved")["fast"]["change"] == 0
    client.post("/v1/sessions/moved/reset")
    fresh = levels(client, "moved")["fast"]
    assert (fresh["norm"], fresh["change"]) == (0, 0)  # made from the fresh memory
    client.post("/v1/sessions/moved/fork", json={"id": "moved-fork", "version": 1})
    forked = levels(client, "moved-fork")["fast"]
    assert forked["norm"] == levels(client, "moved", 1)["fast"]["norm"]
    assert forked["change"] is None  # it was made from a version of another session
    for turn in range(8):
        chat(client, f"more {turn}", session="moved")
    oldest = client.get("/v1/sessions/moved/history").json()["data"][-1]["version"]
    assert levels(client, "moved", oldest)["fast"]["change"] is None  # the version before is gone
    assert levels(client, "moved", oldest + 1)["fast"]["change"] > 0


def test_change_of_adaptive_levels_and_reset_of_one(
    serve: Any, settings: Callable[..., Any], leveled_folder: Path, chat: Chat
) -> None:
    with serve(settings(models=(str(leveled_folder),))) as server, server.client() as client:
        chat(client, "my name is Ada and I live in Rome", session="slow")
        found = levels(client, "slow")
        for name in ("cms.1", "cms.2"):
            assert found[name]["change"] == pytest.approx(found[name]["norm"])
            assert found[name]["norm"] > 0
            assert [part["name"] for part in found[name]["parts"]] == ["blocks.1"]
        client.post("/v1/sessions/slow/reset", json={"levels": ["cms.1"]})
        after = levels(client, "slow")
        assert (after["cms.1"]["norm"], after["cms.1"]["updates"]) == (0, 0)
        assert after["cms.1"]["change"] == pytest.approx(found["cms.1"]["norm"])
        assert after["cms.2"]["norm"] == found["cms.2"]["norm"]
        assert after["cms.2"]["change"] == 0


def test_surprise_is_what_scoring_on_the_session_says(client: httpx.Client, chat: Chat) -> None:
    first = chat(client, "my name is Ada", session="surprise", **SURPRISE).json()["session"]["surprise"]
    alone = chat(client, "my name is Ada", prompt_logprobs=0).json()["prompt_logprobs"][1:]
    assert [one["surprise"] for one in first] == pytest.approx([-next(iter(one.values()))["logprob"] for one in alone])
    asked = {"messages": [{"role": "user", "content": "who am I?"}]}
    tokens = client.post("/tokenize", json=asked).json()["tokens"]
    end = client.get("/tokenizer_info").json()["end_token_id"]
    body = {"model": "tiny", "prompt": [end, *tokens], "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}
    scored = client.post("/v1/completions", json=body, headers={"X-Session-ID": "surprise"}).json()
    read = chat(client, "who am I?", session="surprise", **SURPRISE).json()["session"]["surprise"]
    expected = scored["choices"][0]["logprobs"]["token_logprobs"][: len(tokens) + 1]
    assert [-one["surprise"] for one in read] == pytest.approx(expected, abs=1e-4)
    assert "".join(one["token"] for one in read if not one["special"]) == " who am I?"
    assert bytes(byte for one in read if not one["special"] for byte in one["bytes"]) == b" who am I?"


def test_surprise_changes_nothing_else(client: httpx.Client, chat: Chat) -> None:
    plain = chat(client, "my name is Ada", session="unsurprised").json()
    told = chat(client, "my name is Ada", session="told", **SURPRISE).json()
    assert "surprise" not in plain["session"]
    assert "prompt_logprobs" not in told
    assert told["choices"] == plain["choices"]
    assert told["session"]["digest"] == plain["session"]["digest"]


def test_surprise_of_a_stream_is_in_its_last_chunk_and_in_replays(client: httpx.Client, chat: Chat) -> None:
    asked = {**SURPRISE, "stream": True, "request_id": "once"}
    texts = [chat(client, "my name is Ada", session="streamed", **asked).text for _ in range(2)]
    for text in texts:
        bodies = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert all("session" not in body for body in bodies[:-1])
        assert "".join(one["token"] for one in bodies[-1]["session"]["surprise"] if not one["special"]).strip()
    assert client.get("/v1/sessions/streamed").json()["version"] == 1


def test_surprise_of_learning_and_of_not_learning(client: httpx.Client, chat: Chat) -> None:
    learned = client.post("/v1/sessions/read/learn", json={"text": "my name is Ada", "surprise": True}).json()
    assert learned["session"]["surprise"]
    assert "surprise" not in client.post("/v1/sessions/read/learn", json={"text": "x"}).json()["session"]
    off = chat(client, "my name is Ada", session="read", memory={"learn": "off", "surprise": True}).json()
    assert off["session"]["surprise"]
    assert off["session"]["version"] == 2


def test_surprise_is_refused_by_name_where_there_is_none(client: httpx.Client, chat: Chat) -> None:
    refused = [
        chat(client, "hi", **SURPRISE),
        client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "session_id": "s", **SURPRISE}),
        client.post("/v1/responses", json={"model": "tiny", "input": "hi", "session_id": "s", **SURPRISE}),
    ]
    for reply in refused:
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "memory.surprise"
