"""Minutes of mixed turns, snapshots, restores, forks, resets, exports and deletes: memory is flat, counters agree."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections import Counter
from typing import Any

import httpx
import pytest

SECONDS = float(os.environ.get("NESTED_SOAK_SECONDS", "20"))
ADMIN = {"Authorization": "Bearer key-of-the-admin"}
USERS, SESSIONS = 4, 12
EXPECTED = {200, 400, 404, 409}  # 400 = too many snapshots


class User(threading.Thread):
    """Does something random to one of its sessions until the time is over; `versions` are the known heads."""

    def __init__(self, server: Any, turn: Any, number: int, until: float) -> None:
        super().__init__()
        self._server, self._turn, self._until = server, turn, until
        self._luck = random.Random(number)
        self._name = f"user{number}"
        self.tally: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.problem: BaseException | None = None

    def run(self) -> None:
        actions = [self._talk] * 8 + [self._leave, self._snapshot, self._restore, self._fork, self._reset]
        actions += [self._move, self._erase, self._memoryless]
        try:
            with self._server.client() as http:
                while time.monotonic() < self._until:
                    action = self._luck.choice(actions)
                    action(http, f"{self._name}-{self._luck.randrange(SESSIONS)}")
                    self.tally[action.__name__.strip("_")] += 1
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.problem = error

    def _wrote(self, reply: httpx.Response, session: str) -> None:
        assert reply.status_code in EXPECTED, reply.text
        if reply.status_code == 200:
            self.versions[session] += 1
            assert int(reply.headers["x-session-version"]) == self.versions[session], session

    def _talk(self, http: httpx.Client, session: str) -> None:
        tokens = self._luck.choice((4, 8, 24))
        self._wrote(self._turn(http, f"number {self._luck.random()}", session, max_tokens=tokens), session)

    def _leave(self, http: httpx.Client, session: str) -> None:
        try:
            self._turn(http, "never mind", session, max_tokens=3800, timeout=0.05)
        except httpx.TimeoutException:
            return
        raise AssertionError("3800 tokens in 50 ms")

    def _memoryless(self, http: httpx.Client, _session: str) -> None:
        assert self._turn(http, "hello").status_code == 200

    def _snapshot(self, http: httpx.Client, session: str) -> None:
        assert http.post(f"/v1/sessions/{session}/snapshot").status_code in EXPECTED

    def _restore(self, http: httpx.Client, session: str) -> None:
        kept = http.get(f"/v1/sessions/{session}/snapshots").json().get("data", [])
        if kept:
            one = self._luck.choice(kept)["snapshot"]
            self._wrote(http.post(f"/v1/sessions/{session}/restore", json={"snapshot": one}), session)

    def _fork(self, http: httpx.Client, session: str) -> None:
        target = f"{self._name}-{self._luck.randrange(SESSIONS)}"
        self._wrote(http.post(f"/v1/sessions/{session}/fork", json={"id": target}), target)

    def _reset(self, http: httpx.Client, session: str) -> None:
        self._wrote(http.post(f"/v1/sessions/{session}/reset"), session)

    def _move(self, http: httpx.Client, session: str) -> None:
        blob = http.get(f"/v1/sessions/{session}/export")
        if blob.status_code == 200:
            target = f"{self._name}-{self._luck.randrange(SESSIONS)}"
            self._wrote(http.put(f"/v1/sessions/{target}/import", content=blob.content), target)

    def _erase(self, http: httpx.Client, session: str) -> None:
        reply = http.delete(f"/v1/sessions/{session}")
        assert reply.status_code in (200, 404)
        assert (reply.status_code == 200) == (self.versions[session] > 0)
        self.versions[session] = 0


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
def test_soak(serve: Any, store_url: str, turn: Any, healthy: Any) -> None:
    server = serve(store_url, "--sweep-seconds", "5")
    began = time.monotonic()
    users = [User(server, turn, number, began + SECONDS) for number in range(USERS)]
    samples: list[tuple[float, int]] = []
    for user in users:
        user.start()
    while any(user.is_alive() for user in users):
        time.sleep(min(1.0, SECONDS / 50))
        samples.append((time.monotonic() - began, server.rss()))
    for user in users:
        user.join()
        assert user.problem is None, user.problem
    second = statistics.median(rss for when, rss in samples if SECONDS * 0.25 < when <= SECONDS * 0.5)
    last = statistics.median(rss for when, rss in samples if when > SECONDS * 0.75)
    with server.client() as http:
        for _ in range(500):  # the last client that left may still be in a slot
            stats = http.get("/admin/stats", headers=ADMIN).json()
            if stats["models"]["tiny"]["slots_free"] == stats["models"]["tiny"]["slots"]:
                break
            time.sleep(0.02)
        listed = {one["id"]: one["version"] for one in http.get("/v1/sessions").json()["data"]}
    tally = sum((user.tally for user in users), Counter())
    print(f"{store_url.partition(':')[0]} {SECONDS:.0f} s: {sum(tally.values())} actions {dict(tally)}")
    print(f"RSS {second / 1e6:.1f} MB in the second quarter, {last / 1e6:.1f} MB in the last; {stats}")
    assert stats["models"]["tiny"]["running"] == stats["models"]["tiny"]["waiting"] == 0
    assert stats["models"]["tiny"]["slots_free"] == stats["models"]["tiny"]["slots"]
    assert listed == {session: version for user in users for session, version in user.versions.items() if version}
    assert stats["store"]["sessions"] == len(listed)
    healthy(server)
    assert last - second < max(8e6, 0.03 * second)
