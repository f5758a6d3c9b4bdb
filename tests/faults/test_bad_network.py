"""A proxy between server and Redis that delays, drops and cuts replies, while clients disconnect: nobody ever gets
another session's bytes."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import httpx
import pytest

USERS = 8
SETTLED = ((409, "version_conflict"), (404, "not_found"))  # answers of somebody who holds the lease


class BadNetwork:
    """Forwards TCP to a port. Of the reply pieces it delays some, swallows some and cuts some in the middle."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._seed = port, seed
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self.is_bad = False
        self.tally: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        number = 0
        while not self._closing.is_set():
            if select.select([self._listener], [], [], 0.1)[0]:
                near, _ = self._listener.accept()
                number += 1
                self._start(self._forward, near, random.Random(self._seed * 100_000 + number))

    def _forward(self, near: socket.socket, luck: random.Random) -> None:
        with near:
            try:
                far = socket.create_connection(("127.0.0.1", self._port), timeout=5)
            except OSError:
                return
            with far:
                while not self._closing.is_set() and self._pass_on(near, far, luck):
                    pass

    def _pass_on(self, near: socket.socket, far: socket.socket, luck: random.Random) -> bool:
        """One round; False when the connection is over."""
        try:
            for source in select.select([near, far], [], [], 0.1)[0]:
                piece = source.recv(1 << 16)
                if not piece:
                    return False
                if source is near:
                    far.sendall(piece)
                elif not self._reply(near, piece, luck):
                    return False
        except OSError:
            return False
        return True

    def _reply(self, near: socket.socket, piece: bytes, luck: random.Random) -> bool:
        fate = luck.random() if self.is_bad else 1.0
        if fate < 0.010:
            self.tally["cut"] += 1
            near.sendall(piece[: luck.randrange(len(piece))])
            return False
        if fate < 0.015:
            self.tally["dropped"] += 1
            time.sleep(0.3)
            return False
        if fate < 0.10:
            self.tally["delayed"] += 1
            time.sleep(luck.uniform(0.0, 0.05))
        near.sendall(piece)
        return True


class User(threading.Thread):
    """One session's client. `told` are the messages the memory has read, as far as the versions prove."""

    def __init__(self, server: Any, turn: Any, settled: Any, number: int, turns: int) -> None:
        super().__init__()
        self._server, self._turn, self._settled, self._turns = server, turn, settled, turns
        self._luck = random.Random(number)
        self.name = f"user{number}"
        self.told: list[str] = []
        self.replies: dict[int, tuple[str, str]] = {}
        self.ends: Counter[str] = Counter()
        self.problem: Exception | None = None

    def run(self) -> None:
        try:
            with self._server.client() as http:
                for number in range(self._turns):
                    self._say(http, f"{self.name} has secret {number * 37 % 101}")
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.problem = error

    def _say(self, http: httpx.Client, text: str) -> None:
        patience = self._luck.uniform(0.005, 0.15) if self._luck.random() < 0.3 else 60.0
        try:
            reply = self._turn(http, text, self.name, timeout=patience)
        except httpx.TimeoutException:
            self.ends["left"] += 1
            self._look(http, text)
            return
        self.ends[str(reply.status_code)] += 1
        if reply.status_code == 200:
            body = reply.json()
            assert body["session"]["id"] == self.name
            self.told.append(text)
            assert body["session"]["version"] == len(self.told)
            self.replies[len(self.told)] = (body["choices"][0]["message"]["content"], body["session"]["digest"])
        else:
            assert reply.status_code in (409, 503), reply.text
            assert reply.json()["error"]["code"] in ("store_unavailable", "session_busy", "lease_lost"), reply.text
            self._look(http, text)

    def _look(self, http: httpx.Client, text: str) -> None:
        """Was the turn committed although nobody heard of it? Taking the lease makes sure it cannot happen later."""
        deadline = time.monotonic() + 60
        probe = None
        while probe is None or (probe.status_code, probe.json()["error"]["code"]) not in SETTLED:
            assert time.monotonic() < deadline
            probe = http.post(f"/v1/sessions/{self.name}/reset", headers={"If-Match": "999999"})
        found = self._settled(http, self.name)
        assert found["version"] in (len(self.told), len(self.told) + 1), (found, len(self.told))
        if found["version"] > len(self.told):
            self.told.append(text)


@pytest.mark.redis
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_no_reply_reaches_another_session(
    serve: Any, redis: Any, turn: Any, settled: Any, alone: Any, healthy: Any, scaled: Callable[[int], int]
) -> None:
    """Whatever was acknowledged is what the same messages give alone; every state read was bound to its session."""
    with BadNetwork(redis().port, seed=11) as network:
        # One slot: with companions in the batch the last bits of a float32 state differ, and digests with them.
        server = serve(network.url, "--slots", "1", RESIDENT_BYTES=0)
        users = [User(server, turn, settled, number, scaled(60)) for number in range(USERS)]
        network.is_bad = True
        for user in users:
            user.start()
        for user in users:
            user.join()
        network.is_bad = False
        for user in users:
            assert user.problem is None, user.problem
        with server.client() as http:
            final = {user.name: settled(http, user.name) for user in users}
            metrics = http.get("/metrics").text
        healthy(server)
    for user in users:
        expected = alone(user.told)
        assert final[user.name]["version"] == len(user.told)
        assert final[user.name]["digest"] == expected[-1][1]
        for version, heard in user.replies.items():
            assert heard == expected[version - 1]
    ends = sum((user.ends for user in users), Counter())
    loads = next(line for line in metrics.splitlines() if line.startswith("nested_memory_load_seconds_count"))
    print(f"network {dict(network.tally)}, turns {dict(ends)}, bound states read: {loads.split()[1]}, mismatches: 0")
    assert 'nested_memory_conflicts_total{code="state_mismatch"}' not in metrics
    assert 'status="422"' not in metrics
    assert 'status="500"' not in metrics
    assert float(loads.split()[1]) >= ends["200"] - USERS
    if scaled(100) >= 100:
        assert network.tally["cut"] > 10
        assert network.tally["delayed"] > 100
        assert ends["left"] > 10
