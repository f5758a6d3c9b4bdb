"""SIGKILL of Redis: what was promised is still there, turns are refused meanwhile, memoryless requests are served."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.redis
USERS = 4


class User(threading.Thread):
    """Talks to one session until told to stop; remembers what was acknowledged and how turns ended."""

    def __init__(self, server: Any, turn: Callable[..., httpx.Response], name: str, stopping: threading.Event) -> None:
        super().__init__()
        self._server, self._turn, self.name, self._stopping = server, turn, name, stopping
        self.acknowledged: list[tuple[int, str]] = []
        self.statuses: list[int] = []
        self.problems: list[str] = []

    def run(self) -> None:
        with self._server.client() as http:
            while not self._stopping.is_set():
                reply = self._turn(http, f"{self.name} says {len(self.statuses)}", self.name)
                self.statuses.append(reply.status_code)
                if reply.status_code == 200:
                    session = reply.json()["session"]
                    self.acknowledged.append((session["version"], session["digest"]))
                elif reply.status_code not in (409, 503):
                    self.problems.append(reply.text)
                elif reply.status_code == 503 and int(reply.headers["retry-after"]) < 1:
                    self.problems.append("503 without a useful Retry-After")
                else:
                    time.sleep(0.02)


def test_the_durability_named_is_that_of_this_commit(serve: Any, redis: Any, turn: Any) -> None:
    """The replica dies between two turns: the second is not said to be acknowledged by it."""
    leader, follower = redis("everysec"), redis("everysec")
    follower.send(f"REPLICAOF 127.0.0.1 {leader.port}")
    with serve(leader.url).client() as http:

        def named() -> str:
            return str(turn(http, "my name is Ada", "s").json()["session"]["durability"])

        deadline = time.monotonic() + 60
        while named() != "acked":
            assert time.monotonic() < deadline
            assert http.get("/ready").status_code == 200  # looks at the durability again
        os.kill(follower.process.pid, signal.SIGSTOP)
        assert named() == "memory"


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_redis_is_killed_under_load(
    serve: Any, redis: Any, turn: Any, settled: Any, healthy: Any, scaled: Callable[[int], int], fsync: str
) -> None:
    """Always: no acknowledged version is ever lost. Everysec: the durability says "memory", and nothing is torn."""
    luck, store = random.Random(3), redis(fsync)
    server = serve(f"{store.url}", WAIT_SECONDS=2)
    kills, lost = scaled(20), 0
    for _ in range(kills):
        stopping = threading.Event()
        users = [User(server, turn, f"user{number}", stopping) for number in range(USERS)]
        for user in users:
            user.start()
        time.sleep(luck.uniform(0.2, 1.2))
        store.kill()
        time.sleep(luck.uniform(0.0, 0.3))
        store.start()
        time.sleep(0.3)
        stopping.set()
        for user in users:
            user.join()
        with server.client() as http:
            for user in users:
                assert not user.problems
                found = settled(http, user.name)
                history = http.get(f"/v1/sessions/{user.name}/history").json().get("data", [])
                numbers = [one["version"] for one in history]
                assert numbers == list(range(found["version"], found["version"] - len(numbers), -1))
                newest = max((version for version, _ in user.acknowledged), default=0)
                digests = dict(user.acknowledged)  # a version that was lost and written again: the later one counts
                lost += max(0, newest - found["version"])
                if fsync == "always":
                    assert found["version"] >= newest
                    known = {one["version"]: one["digest"] for one in history}
                    assert all(known.get(version, digest) == digest for version, digest in digests.items())
        healthy(server)
    with server.client() as http:
        durability = turn(http, "hi", "last").json()["session"]["durability"]
    print(f"{fsync}: {kills} kills, {lost} acknowledged versions lost, durability named {durability!r}")
    assert durability == ("fsynced" if fsync == "always" else "memory")
    assert fsync == "everysec" or lost == 0


def test_while_the_store_is_down(serve: Any, redis: Any, turn: Any, settled: Any, pool: Any) -> None:
    """P10: stateful 503 with Retry-After, memoryless as before, /ready no, /health yes; afterwards all is as it was."""
    store = redis()
    server = serve(store.url)
    with server.client() as http:
        before = turn(http, "hello").json()["choices"]
        kept = turn(http, "my name is Ada", "ada").json()["session"]
        store.kill()
        stateful = [
            pool.submit(turn, http, "who am I?", "ada"),
            pool.submit(turn, http, "who am I?", "ada", stream=True),
            pool.submit(http.get, "/v1/sessions/ada"),
            pool.submit(http.post, "/v1/sessions/ada/reset"),
            pool.submit(http.get, "/v1/sessions"),
        ]
        memoryless = [pool.submit(turn, http, "hello") for _ in range(4)]
        for waiting in stateful:
            reply = waiting.result()
            assert reply.status_code == 503, reply.text
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "store_unavailable"
        for waiting in memoryless:
            assert waiting.result().json()["choices"] == before
        ready = http.get("/ready")
        assert ready.status_code == 503
        assert "store" in ready.json()
        assert http.get("/health").json() == {"status": "ok"}
        store.start()
        assert settled(http, "ada")["digest"] == kept["digest"]
        assert http.get("/ready").status_code == 200
        assert turn(http, "who am I?", "ada").json()["session"]["version"] == 2
