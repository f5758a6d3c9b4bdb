"""Levels that learn, on the real server: what replies, routes and metrics say of updates and of one that diverges."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nested_runtime.state import codec
from nested_runtime.state.snapshot import Binding, Snapshot

Chat = Callable[..., httpx.Response]
Levels = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def leveled(serve: Any, settings: Callable[..., Any], leveled_folder: Path) -> Iterator[Any]:
    with serve(settings(models=(str(leveled_folder),))) as server:
        yield server


@pytest.fixture
def http(leveled: Any) -> Iterator[httpx.Client]:
    with leveled.client() as client:
        yield client


def levels_of(http: httpx.Client, name: str) -> Levels:
    reply = http.get(f"/v1/sessions/{name}/levels")
    assert reply.status_code == 200, reply.text
    return {one["level"]: one for one in reply.json()["data"]}


def metric(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^nested_{name}(?:\{{[^}}]*\}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_clocks_follow_the_tokens_read(http: httpx.Client, chat: Chat) -> None:
    seen = 0
    for number in range(4):
        session = chat(http, f"my name is Ada {number}", session="clocks").json()["session"]
        tokens = session["learned_tokens"]
        # A step is due before the next chunk's first token is read, so n full chunks mean n steps or one less.
        seen += session["updates"]
        assert session["updates_refused"] == 0
        assert seen == (tokens - 1) // 8
        levels = levels_of(http, "clocks")
        assert levels["fast"]["chunk"] is None
        assert levels["fast"]["updates"] is None
        for name, chunk, taken in (("cms.1", 8, seen), ("cms.2", 16, seen // 2)):
            level = levels[name]
            assert (level["chunk"], level["updates"], level["updates_refused"]) == (chunk, taken, 0)
            assert level["tokens_since_update"] == tokens - taken * chunk
            assert 0 < level["norm"] <= level["max_norm"]
    assert (levels["cms.1"]["rank"], levels["cms.2"]["rank"]) == (None, 2)
    assert levels["cms.2"]["optimizer"] == "momentum"


def test_learning_the_prompt_counts_the_prompts_updates_alone(http: httpx.Client, chat: Chat) -> None:
    text = "x" * 40
    memory = {"learn": "prompt"}
    session = chat(http, text, session="prompt", max_tokens=64, memory=memory).json()["session"]
    assert session["updates"] == (session["learned_tokens"] - 1) // 8
    assert levels_of(http, "prompt")["cms.1"]["updates"] == session["updates"]


def test_a_session_at_rest_has_fresh_levels(http: httpx.Client) -> None:
    http.post("/v1/sessions", json={"id": "unread"})
    levels = levels_of(http, "unread")
    assert [levels["cms.1"][name] for name in ("norm", "updates", "tokens_since_update")] == [0, 0, 0]


def import_changed(leveled: Any, http: httpx.Client, name: str, tensor: str, value: float) -> dict[str, Any]:
    """Let the session go on from its memory with what is not zero in one tensor set to `value`."""
    model = leveled.service.runtime.models["tiny"]
    blob = http.get(f"/v1/sessions/{name}/export").content
    snapshot = codec.decode(blob, model.specs, model.backend.fingerprint)
    tensors = {n: t.clone() for n, t in snapshot.tensors.items()}
    tensors[tensor][tensors[tensor] != 0] = value
    old = snapshot.header
    changed = Snapshot.take(
        tensors, fingerprint=old.fingerprint, binding=Binding(), position=old.position, pending=old.pending
    )
    reply = http.put(f"/v1/sessions/{name}/import", content=codec.encode(changed))
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_diverging_update_is_refused_and_reported_and_the_session_serves_on(
    leveled: Any, http: httpx.Client, chat: Chat
) -> None:
    for name in ("edge", "healthy"):
        assert chat(http, "my name is Ada", session=name).status_code == 200
    assert levels_of(http, "edge")["cms.1"]["tokens_since_update"] in range(1, 8), "within a chunk"
    import_changed(leveled, http, "edge", "chunk.stream", 3e38)  # the chunk can be read on, its gradient overflows
    norm, refused = levels_of(http, "edge")["cms.1"]["norm"], metric(http, "memory_updates_refused_total")
    bad = chat(http, "and Rome", session="edge", max_tokens=1).json()["session"]
    good = chat(http, "and Rome", session="healthy", max_tokens=1).json()["session"]
    assert (bad["updates"], bad["updates_refused"]) == (good["updates"] - 1, 1)
    assert good["updates_refused"] == 0
    assert levels_of(http, "edge")["cms.1"]["updates_refused"] == 1
    assert metric(http, "memory_updates_refused_total") == refused + 1
    assert bad["updates"] or levels_of(http, "edge")["cms.1"]["norm"] == norm, "the level is as it was"
    again = chat(http, "what is my name?", session="edge").json()["session"]
    assert again["updates"] > 0
    assert again["updates_refused"] == 0


def test_a_turn_that_cannot_be_computed_leaves_the_old_version(leveled: Any, http: httpx.Client, chat: Chat) -> None:
    assert chat(http, "my name is Ada", session="broken").status_code == 200
    before = import_changed(leveled, http, "broken", "blocks.0.memory.anchor", 3e38)
    reply = chat(http, "what is my name?", session="broken")
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "update_diverged")
    assert reply.headers["x-should-retry"] == "false"
    assert http.get("/v1/sessions/broken").json()["version"] == before["version"]
    assert http.post("/v1/sessions/broken/restore", json={"version": 1}).status_code == 200
    assert chat(http, "what is my name?", session="broken").status_code == 200


def test_update_share_is_an_option(serve: Any, settings: Callable[..., Any], leveled_folder: Path, chat: Chat) -> None:
    with (
        serve(settings(models=(str(leveled_folder),), engine={"update_share": 0.25})) as server,
        server.client() as http,
    ):
        assert server.service.runtime.models["tiny"].backend._engine.updates.share == 0.25
        assert chat(http, "my name is Ada", session="s").json()["session"]["updates"] > 0
