"""Two servers on one store: one commit per version, stale writers are fenced, snapshots and deletions are shared."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from typing import Any

import httpx
import pytest

ADMIN = {"Authorization": "Bearer key-of-the-admin"}


def busy(http: httpx.Client) -> bool:
    stats = http.get("/admin/stats", headers=ADMIN).json()
    return bool(stats["models"]["tiny"]["running"])


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("expect", [None, "0"])
def test_twenty_turns_at_once(
    serve: Any, store_url: str, turn: Any, settled: Any, healthy: Any, pool: Any, expect: str | None
) -> None:
    """One commit for each that is answered, the others 409; all of them want version 0 = exactly one is answered."""
    servers = [serve(store_url, WAIT_SECONDS=60), serve(store_url, WAIT_SECONDS=60)]
    headers = {"If-Match": expect} if expect is not None else {}
    with servers[0].client() as first, servers[1].client() as second:
        asked = [
            pool.submit(turn, (first, second)[number % 2], f"turn {number}", "shared", headers=headers)
            for number in range(20)
        ]
        replies = [one.result() for one in asked]
        codes = Counter(reply.status_code for reply in replies)
        assert codes[200] + codes[409] == 20, codes
        assert codes[200] == 1 if expect is not None else codes[200] >= 10
        answered = sorted(reply.json()["session"]["version"] for reply in replies if reply.status_code == 200)
        assert answered == list(range(1, codes[200] + 1))
        for refused in (reply for reply in replies if reply.status_code == 409):
            wanted = {"session_busy"} if expect is None else {"session_busy", "version_conflict"}
            assert refused.json()["error"]["code"] in wanted
            assert refused.headers["x-should-retry"] == "false"
        assert settled(first, "shared") == settled(second, "shared")
        assert settled(first, "shared")["version"] == codes[200]
        history = first.get("/v1/sessions/shared/history").json()["data"]
        by_version = {reply.json()["session"]["version"]: reply for reply in replies if reply.status_code == 200}
        for version in history:
            assert version["digest"] == by_version[version["version"]].json()["session"]["digest"]
    healthy(servers[0])


@pytest.mark.parametrize("stream", [False, True])
def test_a_paused_server_is_fenced(
    serve: Any, store_url: str, turn: Any, settled: Any, alone: Any, healthy: Any, pool: Any, stream: bool
) -> None:
    """SIGSTOP in the middle of a turn, past the lease; somebody else commits; SIGCONT: 409, nothing overwritten."""
    lease = 1.0
    paused, other = serve(store_url, LEASE_SECONDS=lease), serve(store_url, LEASE_SECONDS=lease, WAIT_SECONDS=20)
    with paused.client() as http, other.client() as elsewhere:
        turn(http, "one", "s")
        slow = pool.submit(turn, http, "too late", "s", max_tokens=1500, ignore_eos=True, stream=stream, timeout=300)
        until(lambda: busy(http))
        paused.send(signal.SIGSTOP)
        try:
            taken = turn(elsewhere, "two", "s").json()["session"]
        finally:
            paused.send(signal.SIGCONT)
        reply = slow.result()
        if stream:
            events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            error = json.loads(events[-2])["error"]
        else:
            assert reply.status_code == 409
            error = reply.json()["error"]
        assert error["code"] == "lease_lost"
        assert taken["version"] == 2
        for server in (http, elsewhere):
            assert settled(server, "s")["digest"] == taken["digest"]
        assert taken["digest"] == alone(["one", "two"])[1][1]
        assert turn(http, "three", "s").json()["session"]["digest"] == alone(["one", "two", "three"])[2][1]
    healthy(other)


def test_a_snapshot_outlives_servers(serve: Any, store_url: str, turn: Any, settled: Any) -> None:
    """P8: snapshot on one server, more turns on another, restore on either, also after SIGKILL of both."""
    servers = [serve(store_url), serve(store_url)]
    with servers[0].client() as first, servers[1].client() as second:
        turn(first, "my name is Ada", "s")
        kept = turn(second, "I live in Rome", "s").json()["session"]
        snapshot = first.post("/v1/sessions/s/snapshot").json()["snapshot"]
        expected = turn(first, "who am I?", "s", max_tokens=24).json()
        for number in range(10):  # more than are kept without a snapshot
            turn((first, second)[number % 2], f"more {number}", "s")
        restored = second.post("/v1/sessions/s/restore", json={"snapshot": snapshot}).json()
        assert restored["digest"] == kept["digest"]
        again = turn(second, "who am I?", "s", max_tokens=24).json()
        assert again["choices"] == expected["choices"]
        assert again["session"]["digest"] == expected["session"]["digest"]
    for server in servers:
        server.stop()
        server.start()
    with servers[0].client() as first, servers[1].client() as second:
        assert first.post("/v1/sessions/s/restore", json={"snapshot": snapshot}).json()["digest"] == kept["digest"]
        once_more = turn(second, "who am I?", "s", max_tokens=24).json()
        assert once_more["choices"] == expected["choices"]
        assert once_more["session"]["digest"] == expected["session"]["digest"]


def test_erased_copies_go_though_the_id_is_used_again(serve: Any, store_url: str, turn: Any) -> None:
    """A server that did not see the deletion drops what it held, although the session exists again."""
    servers = [serve(store_url, "--sweep-seconds", "0.5") for _ in range(2)]

    def resident(http: httpx.Client) -> int:
        return int(http.get("/admin/stats", headers=ADMIN).json()["resident"]["states"])

    with servers[0].client() as first, servers[1].client() as second:
        turn(second, "my name is Ada", "again")
        assert resident(second) == 1
        assert first.delete("/v1/sessions/again").status_code == 200
        turn(first, "something else", "again")
        until(lambda: resident(second) == 0)
        time.sleep(1.2)
        assert resident(first) == 1  # what is kept stays resident


def test_deleted_is_gone_everywhere(serve: Any, store_url: str, turn: Any, healthy: Any) -> None:
    """P9: no copy on the other server, no answer to replay, no snapshot; the id starts afresh; reset = fresh."""
    servers = [serve(store_url, "--sweep-seconds", "0.5") for _ in range(2)]
    key = {"Idempotency-Key": "the same"}
    with servers[0].client() as first, servers[1].client() as second:
        fresh = turn(first, "my name is Ada", "fresh").json()["session"]
        turn(first, "my name is Ada", "reset", headers=key)
        turn(second, "I live in Rome", "reset")
        empty = first.post("/v1/sessions/reset/reset").json()["digest"]
        second.post("/v1/sessions/fresh/fork", json={"id": "twin"})
        assert second.post("/v1/sessions/twin/reset").json()["digest"] == empty
        assert turn(second, "my name is Ada", "reset").json()["session"]["digest"] == fresh["digest"]
        for http in (first, second):
            turn(http, "hi", "reset", headers={"Idempotency-Key": f"on {http.base_url}"})
        snapshot = second.post("/v1/sessions/reset/snapshot").json()["snapshot"]
        for name in ("reset", "twin", "fresh"):
            assert first.delete(f"/v1/sessions/{name}").status_code == 200
        for http in (first, second):
            assert http.get("/v1/sessions/reset").status_code == 404
            assert http.get("/v1/sessions/reset/snapshots").status_code == 404
            assert http.post("/v1/sessions/reset/restore", json={"snapshot": snapshot}).status_code == 404
            assert http.get("/v1/sessions").json()["data"] == []
            until(lambda http=http: http.get("/admin/stats", headers=ADMIN).json()["resident"]["states"] == 0)
        stored = first.get("/admin/stats", headers=ADMIN).json()["store"]
        assert (stored["sessions"], stored["versions"], stored["snapshots"], stored["bytes"]) == (0, 0, 0, 0)
        again = turn(second, "my name is Ada", "reset", headers=key).json()["session"]
        assert (again["version"], again["digest"]) == (1, fresh["digest"])
    healthy(servers[1])
