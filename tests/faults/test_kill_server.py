"""SIGKILL of the server at random moments of a session: the memory is at N or N+1, whole, and no turn counts twice."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

TURNS = 50


class Client(threading.Thread):
    """Sends one turn; `reply` stays None when the server dies first."""

    def __init__(self, server: Any, turn: Callable[..., httpx.Response], number: int, session: str) -> None:
        super().__init__()
        self._server, self._turn, self._number, self._session = server, turn, number, session
        self.reply: httpx.Response | None = None
        self.seconds = 0.0

    def run(self) -> None:
        key = {"Idempotency-Key": f"turn-{self._number}"}
        try:
            with self._server.client() as http:
                began = time.monotonic()
                self.reply = self._turn(http, message(self._number), self._session, headers=key)
                self.seconds = time.monotonic() - began
        except httpx.TransportError:
            pass


def message(number: int) -> str:
    return f"fact {number} is {number * 7919 % 1000}"


@pytest.mark.timeout(5400)
def test_sigkill_at_random_points(
    serve: Any, store_url: str, turn: Any, settled: Any, alone: Any, healthy: Any, scaled: Callable[[int], int]
) -> None:
    """Every restart finds the acknowledged version or the one after it, with the digest of an undisturbed session.

    An interrupted turn is sent again under its Idempotency-Key, so that a commit whose answer was lost is replayed.
    """
    luck = random.Random(7)
    undisturbed = alone([message(number) for number in range(TURNS)])
    server = serve(store_url)
    session, acknowledged, durations = "s0", 0, [0.05]
    seen = {"before the commit": 0, "after the commit": 0, "answered": 0}
    for point in range(scaled(100)):
        if acknowledged == TURNS:
            session, acknowledged = f"s{point}", 0
        client = Client(server, turn, acknowledged, session)
        client.start()
        if luck.random() < 0.25:
            client.join()
        else:
            time.sleep(luck.uniform(0.0, 1.3 * statistics.median(durations)))
        server.stop()
        client.join()
        server.start()
        with server.client() as http:
            found = settled(http, session)
            if client.reply is not None and client.reply.status_code == 200:
                seen["answered"] += 1
                durations = [*durations[-20:], client.seconds]
                acknowledged += 1
                assert found["version"] == acknowledged
                assert client.reply.json()["session"]["digest"] == found["digest"]
            else:
                assert found["version"] in (acknowledged, acknowledged + 1)
                seen["after the commit" if found["version"] > acknowledged else "before the commit"] += 1
                if luck.random() < 0.5 or found["version"] > acknowledged:
                    key = {"Idempotency-Key": f"turn-{acknowledged}"}
                    again = turn(http, message(acknowledged), session, headers=key)
                    assert again.status_code == 200, again.text
                    assert ("idempotent-replay" in again.headers) == (found["version"] > acknowledged)
                    acknowledged += 1
                    found = settled(http, session)
                    assert found["version"] == acknowledged
                    text = again.json()["choices"][0]["message"]["content"]
                    assert (text, found["digest"]) == undisturbed[acknowledged - 1]
            if found["version"]:
                assert found["digest"] == undisturbed[found["version"] - 1][1]
    with server.client() as http:
        for number in range(acknowledged, TURNS):
            turn(http, message(number), session)
        assert (settled(http, session)["version"], settled(http, session)["digest"]) == (TURNS, undisturbed[-1][1])
    healthy(server)
    print(f"{store_url.partition(':')[0]}: {seen}")
    if scaled(100) >= 100:
        assert seen["before the commit"] > 10
        assert seen["answered"] > 10
