"""200 requests whose client gives up after half a second: nothing stays behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from .conftest import Server

LONG = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "go on"}],
    "max_tokens": 1900,
    "ignore_eos": True,
    "min_tokens": 1900,
}
REQUESTS, AT_A_TIME = 200, 20


def cut(server: Server, number: int, fate: dict[str, int], lock: threading.Lock) -> None:
    """A request of one of four kinds: streamed or not, in a session or not."""
    body: dict[str, Any] = {**LONG, "stream": number % 2 == 0}
    if number % 4 < 2:
        body["session_id"] = f"cut-{number}"
    outcome = "answered"
    with server.client(timeout=httpx.Timeout(0.5, connect=30.0)) as client:
        began = time.monotonic()
        try:
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                for _line in reply.iter_lines():
                    if time.monotonic() - began > 0.5:
                        outcome = "cut"
                        break
        except httpx.TimeoutException:
            outcome = "cut"
    with lock:
        fate[outcome] = fate.get(outcome, 0) + 1


def test_requests_cut_by_their_clients(server: Server, client: httpx.Client, is_full: bool) -> None:
    fate: dict[str, int] = {}
    lock = threading.Lock()
    count = REQUESTS if is_full else REQUESTS // 5
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(lambda number: cut(server, number, fate, lock), range(count)))
    assert fate.get("cut", 0) > count * 0.9, f"the test shows nothing: {fate}"
    began = time.monotonic()
    short = {**LONG, "max_tokens": 10, "min_tokens": 0}
    assert client.post("/v1/chat/completions", json=short, timeout=60).status_code == 200
    took = time.monotonic() - began
    print(f"{fate}; then 10 tokens took {took:.2f} s")
    wait_for(lambda: server.gauge("num_requests_running") == 0 == server.gauge("num_requests_waiting"))
    kept = [one["id"] for one in client.get("/v1/sessions?limit=1000").json()["data"] if one["id"].startswith("cut-")]
    assert len(kept) <= fate.get("answered", 0)  # a turn that was cut taught nothing
    assert took < (5 if is_full else 60), f"a request of 10 tokens took {took:.1f} s"  # full = nothing beside it


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the gauges never came back to 0"
        time.sleep(0.1)
