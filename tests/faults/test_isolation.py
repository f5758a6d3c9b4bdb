"""Many sessions of several tenants at once, with aborts: each is as if it were alone, and slots come back zero."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from nested_runtime.config import EngineConfig, SessionConfig
from nested_runtime.models import loading
from nested_runtime.store.base import SessionKey
from nested_runtime.store.url import open_store
from server.app import create_app, running
from server.assembly import build_service, serve_model
from server.auth import Keys
from server.deps import Service
from server.settings import Settings

TENANTS, SESSIONS, TURNS = 5, 50, 20


@contextmanager
def served(settings: Settings) -> Iterator[tuple[str, Service, asyncio.AbstractEventLoop]]:
    """The real application in a thread of this process, so that its slots can be looked at; in float64.

    In float32 the last bits of a matrix product depend on how many rows it has, so on the companions in the batch.
    """
    model = serve_model(loading.load(settings.models[0], torch.float64), settings)
    keys = Keys.load(settings.api_key_file)
    service = build_service(settings, open_store(settings.store_url), [model], keys=keys)
    server = uvicorn.Server(uvicorn.Config(create_app(service), lifespan="off", log_config=None, access_log=False))
    started: list[tuple[str, Service, asyncio.AbstractEventLoop]] = []
    ready = threading.Event()

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with running(service):
                started.append((f"http://127.0.0.1:{listener.getsockname()[1]}", service, asyncio.get_running_loop()))
                ready.set()
                await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(600)
        yield started[0]
    finally:
        server.should_exit = True
        thread.join(60)


def script(session: int, turns: int) -> list[str]:
    return [f"user {session} has number {session * 131 + turn * 17 % 97}" for turn in range(turns)]


class Person:
    """One session's client: says its lines in order, sometimes leaving a turn and saying the line again."""

    def __init__(self, http: httpx.Client, turn: Any, number: int, lines: list[str]) -> None:
        self._http, self._turn, self._lines = http, turn, lines
        self._luck = random.Random(number)
        self.key = SessionKey(f"tenant{number % TENANTS}", f"session{number}")
        self.number, self._session = number, self.key.session
        self._key = {"Authorization": f"Bearer key-of-tenant-{number % TENANTS}"}
        self.heard: list[str] = []
        self.aborted = 0

    def say_next(self, *, may_leave: bool) -> None:
        line = self._lines[len(self.heard)]
        if may_leave and self._luck.random() < 0.3:
            self._leave(line)
        body = self._turn(self._http, line, self._session, headers=self._key).json()
        assert body["session"]["version"] == len(self.heard) + 1, body
        self.heard.append(body["choices"][0]["message"]["content"])

    def _leave(self, line: str) -> None:
        """A turn too long to end before its client is gone."""
        patience = self._luck.uniform(0.01, 0.1)
        with pytest.raises(httpx.TimeoutException):
            self._turn(self._http, line, self._session, headers=self._key, max_tokens=3800, timeout=patience)
        self.aborted += 1


async def memory(service: Service, key: SessionKey) -> dict[str, torch.Tensor]:
    """A session's state as it is stored."""
    head = await service.vault.head(key)
    service.vault.forget(key)
    return dict((await service.vault.load(key, head, service.runtime.models["tiny"])).tensors or {})


@pytest.mark.timeout(1800)
def test_every_reply_is_that_of_the_session_alone(
    model_folder: Path, tmp_path: Path, turn: Any, scaled: Callable[[int], int]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"tenant{number} key-of-tenant-{number}\n" for number in range(TENANTS)))
    settings = Settings(
        models=(str(model_folder),),
        store=f"sqlite:///{tmp_path}/sessions.db",
        api_key_file=keys,
        engine=EngineConfig(slots=8, threads=1, max_context=4096),
        sessions=SessionConfig(resident_bytes=200_000),  # about a third of the sessions
    )
    turns = scaled(TURNS) if scaled(TURNS) > 2 else 2
    lines = [script(number, turns) for number in range(SESSIONS)]
    with served(settings) as (url, service, loop), httpx.Client(base_url=url, timeout=120) as http:
        people = [Person(http, turn, number, lines[number]) for number in range(SESSIONS)]
        backend = service.runtime.models["tiny"].backend
        with ThreadPoolExecutor(16) as pool:
            for _ in range(turns):
                random.Random(turns).shuffle(people)
                list(pool.map(lambda person: person.say_next(may_leave=True), people))
                assert backend.stats()["running"] == 0
                assert backend.stats()["slots_free"] == 8
                backend._engine.pool.check_integrity(deep=True)  # free slots are zero, byte for byte
        assert asyncio.run_coroutine_threadsafe(service.store.fsck(), loop).result(120) == []
        assert sum(person.aborted for person in people) >= SESSIONS * turns // 10
        kept = [asyncio.run_coroutine_threadsafe(memory(service, one.key), loop).result(120) for one in people]
    quiet = Settings(
        models=(str(model_folder),),
        store="memory:",
        api_key_file=keys,
        engine=EngineConfig(slots=1, threads=1, max_context=4096),
    )
    with served(quiet) as (url, service, loop), httpx.Client(base_url=url, timeout=120) as http:
        for person, state in zip(people, kept, strict=True):
            alone = Person(http, turn, person.number, lines[person.number])
            for _ in range(turns):
                alone.say_next(may_leave=False)
            assert alone.heard == person.heard
            solo = asyncio.run_coroutine_threadsafe(memory(service, person.key), loop).result(120)
            torch.testing.assert_close(state, solo, rtol=1e-9, atol=1e-12)
    print(f"{SESSIONS * turns} turns, {sum(person.aborted for person in people)} aborts, all replies as alone")
