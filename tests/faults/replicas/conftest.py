"""Many sessions at once on several servers, and the same on one undisturbed server."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load


@dataclass
class Traffic:
    """Sessions that each say their messages in order, many at a time, and what came back."""

    client: Callable[[], httpx.Client]
    turn: Callable[..., httpx.Response]
    with_keys: bool
    replies: dict[str, list[str]] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, sessions: list[str], length: int, threads: int = 12) -> None:
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(self._session, name, length) for name in sessions]:
                future.result()

    def _session(self, name: str, length: int) -> None:
        with self.client() as http:
            for number in range(len(self.replies.setdefault(name, [])), length):
                reply = self._once(http, name, number)
                body = reply.json()
                assert body["session"]["version"] == number + 1, (name, number, body)
                self.replies[name].append(body["choices"][0]["message"]["content"])
                with self._lock:
                    self.done += 1
                    self.statuses["replayed" if "idempotent-replay" in reply.headers else "answered"] += 1

    def _once(self, http: httpx.Client, name: str, number: int) -> httpx.Response:
        """The turn's answer; with a key it is asked for again until it comes, without one the first try must do."""
        headers = {"Idempotency-Key": f"{name}-{number}"} if self.with_keys else {}
        deadline = time.monotonic() + 90
        while True:
            try:
                reply = self.turn(http, said(name, number), name, headers=headers)
                if reply.status_code == 200:
                    return reply
                problem = f"status {reply.status_code}: {reply.text[:300]}"
            except httpx.TransportError as error:
                problem = repr(error)
            assert self.with_keys, f"{name}, turn {number}: {problem}"
            assert time.monotonic() < deadline, f"{name}, turn {number}: {problem}"
            with self._lock:
                self.statuses["tried again: " + problem[:11]] += 1
            time.sleep(0.1)


def said(name: str, number: int) -> str:
    return f"{name} fact {number} is {number * 7919 % 1000}"


@pytest.fixture
def traffic_on(turn: Callable[..., httpx.Response]) -> Callable[..., Traffic]:
    """Traffic through clients of one kind."""
    return lambda client, *, with_keys: Traffic(client, turn, with_keys)


@pytest.fixture
def equal_alone(serve: Any, turn: Any) -> Callable[[Traffic], None]:
    """Every transcript is that of one undisturbed server, and so is every memory, but for rounding.

    Sums of a batch are rounded otherwise than those of one sequence alone, so digests may differ here.
    """

    def check(traffic: Traffic) -> None:
        with serve("memory:").client() as quiet, traffic.client() as http:
            for name, texts in traffic.replies.items():
                for number, text in enumerate(texts):
                    assert turn(quiet, said(name, number), name).json()["choices"][0]["message"]["content"] == text
                expected, found = memory(quiet, name), memory(http, name)
                assert expected.keys() == found.keys()
                for tensor, values in expected.items():
                    torch.testing.assert_close(found[tensor], values, rtol=1e-3, atol=1e-4)

    return check


def memory(http: httpx.Client, session: str) -> dict[str, torch.Tensor]:
    blob = http.get(f"/v1/sessions/{session}/export")
    assert blob.status_code == 200
    return load(blob.content)
