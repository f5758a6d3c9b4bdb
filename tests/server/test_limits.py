"""Bounds of requests, sessions, snapshots and versions, each from its option to its refusal; what erasure forgets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from nested_runtime.errors import ConfigError
from nested_runtime.store.base import Limits
from server.options import parse

Chat = Callable[..., httpx.Response]
ADMIN = {"Authorization": "Bearer key-of-admin"}


def test_limits_are_options() -> None:
    words = (
        "--sessions-per-tenant 7 --bytes-per-session 1000 --snapshots-per-session 3 --retain 2 --requests-in-flight 4 "
        "--queue 5 --waiting 6 --lease-seconds 9 --sweep-seconds 1 --max-body-bytes 100 --resident-bytes 200 "
        "--wait-seconds 0"
    )
    chosen = parse(words.split())
    assert chosen.limits == Limits(7, 1000, snapshots_per_session=3, retain=2)
    assert (chosen.requests_in_flight, chosen.max_body_bytes, chosen.sweep_seconds) == (4, 100, 1.0)
    assert (chosen.engine.queue, chosen.sessions.waiting, chosen.sessions.lease_seconds) == (5, 6, 9.0)
    assert (chosen.sessions.resident_bytes, chosen.sessions.wait_seconds) == (200, 0.0)


@pytest.mark.parametrize(
    "words",
    [
        "--retain 0",
        "--requests-in-flight 0",
        "--sweep-seconds 0",
        "--max-body-bytes -1",
        "--session-ttl 10",
        "--session-ttl 10 --lease-seconds 10.5",
    ],
)
def test_impossible_limits(words: str) -> None:
    name = words.split(maxsplit=1)[0].strip("-").replace("-", "_")
    with pytest.raises(ConfigError, match=name):
        parse(words.split())


def test_a_session_may_live_as_long_as_its_lease() -> None:
    assert parse(["--session-ttl", "10", "--lease-seconds", "10"]).session_ttl == 10


# Sampled: greedily the random model says one token for ever, of which a memory can diverge (docs/log.md).
LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 1, "seed": 1}


def test_requests_in_flight(settings: Any, serve: Any, chat: Chat) -> None:
    """A tenant with too many is told to wait; health, the admin and other tenants are not in its way."""
    with serve(settings(requests_in_flight=2)) as server, server.client() as client, ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(chat, client, "slow", **LONG) for _ in range(2)]
        server.wait_until_running(2)
        refused = client.get("/v1/models")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/health").status_code == 200
        assert [one.result().status_code for one in slow] == [200, 200]
        assert client.get("/v1/models").status_code == 200


def test_sessions_and_snapshots_of_a_tenant(settings: Any, serve: Any, chat: Chat) -> None:
    limits = Limits(sessions_per_tenant=2, snapshots_per_session=1)
    with serve(settings(limits=limits)) as server, server.client() as client:
        assert [chat(client, "hi", session=name).status_code for name in "ab"] == [200, 200]
        full = chat(client, "hi", session="c")
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert client.post("/v1/sessions/a/snapshot").status_code == 200
        assert client.post("/v1/sessions/a/snapshot").json()["error"]["code"] == "too_many_snapshots"
        assert client.delete("/v1/sessions/a").status_code == 200
        assert chat(client, "hi", session="c").status_code == 200


def test_answers_that_are_too_large_to_keep(settings: Any, serve: Any, chat: Chat) -> None:
    """With a key: refused, nothing learned. Without one, from a client that repeats by itself: answered, not kept."""
    with serve(settings(limits=Limits(answer_bytes=300))) as server, server.client() as client:
        refused = chat(client, "hi", session="s", headers={"Idempotency-Key": "k"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "Idempotency-Key"
        assert client.get("/v1/sessions/s").status_code == 404
        automatic = [chat(client, "hi", session="s", headers={"x-stainless-retry-count": str(n)}) for n in range(2)]
        assert [one.json()["session"]["version"] for one in automatic] == [1, 2]


def test_erasing_a_tenant_forgets_its_memoryless_requests(settings: Any, serve: Any, chat: Chat, tmp_path: Any) -> None:
    keys = tmp_path / "admin"
    keys.write_text("key-of-admin")
    with serve(settings(admin_key_file=keys)) as server, server.client() as client:
        key = {"Idempotency-Key": "k"}
        first = chat(client, "a question long enough to be cached as a prefix", headers=key)
        backend = server.service.runtime.models["tiny"].backend
        assert backend.stats()["prefix_bytes"] > 0
        assert client.delete("/admin/tenants/default", headers=ADMIN).json() == {"deleted": 0}
        assert client.post("/admin/fsck", headers=ADMIN).json()[
            "healthy"
        ]  # behind the eviction, on the engine's thread
        assert backend.stats()["prefix_bytes"] == 0
        again = chat(client, "a question long enough to be cached as a prefix", headers=key)
        assert again.json()["id"] != first.json()["id"]
