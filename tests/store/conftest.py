"""Stores to test against: memory, SQLite files and a real redis-server of our own (alone and as a cluster of one)."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nested_runtime.store.base import Draft, Lease, SessionKey, StateStore, StoredAnswer, Version
from nested_runtime.store.url import open_store

KEY = SessionKey("acme", "alice")
_numbers = itertools.count()


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class RedisServer:
    """A redis-server process in a folder of its own."""

    def __init__(self, folder: Path, *options: str, answer: bytes = b"+PONG") -> None:
        self._answer = answer
        self.port = 65_535
        while self.port > 55_535:  # a cluster's bus listens 10,000 higher
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = int(probe.getsockname()[1])
        self._folder, self._options = folder, options
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        args = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        self.process = subprocess.Popen(
            ["redis-server", *args, *self._options], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 20
        while not self.send("PING").startswith(self._answer):
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

    def send(self, command: str) -> bytes:
        """The raw reply to an inline command, empty when nobody listens."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(command.encode() + b"\r\n")
                return connection.recv(4096)
        except OSError:
            return b""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """Start servers that end with the test session."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    started: list[RedisServer] = []

    def start(*options: str, **details: Any) -> RedisServer:
        started.append(RedisServer(tmp_path_factory.mktemp("redis"), *options, **details))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def redis_server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    return start_redis()


@pytest.fixture(scope="session")
def redis_cluster(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """One node that owns every slot: it refuses scripts and pipelines that cross slots, as a large cluster would."""
    server = start_redis("--cluster-enabled", "yes")
    assert server.send("CLUSTER ADDSLOTSRANGE 0 16383") == b"+OK\r\n"
    deadline = time.monotonic() + 20
    while b"cluster_state:ok" not in server.send("CLUSTER INFO"):
        assert time.monotonic() < deadline, "the cluster did not form"
        time.sleep(0.05)
    return server


@dataclass
class Bench:
    """One store under test: `open` as many handles on it as needed, all on one clock."""

    url: str
    kind: str
    clock: Clock = field(default_factory=Clock)

    def open(self, **options: Any) -> StateStore:
        return open_store(self.url, clock=self.clock, **options)

    @staticmethod
    def draft(state: bytes = b"", **fields: Any) -> Draft:
        return Draft(
            **{"kind": "turn", "tokens": len(state), "digest": f"d{hash(state)}", "fingerprint": "fp", **fields}
        )

    async def commit(
        self, store: StateStore, lease: Lease, parent: int, state: bytes, answer: StoredAnswer | None = None
    ) -> Version:
        return await store.commit(lease, parent, state, self.draft(state), answer)

    async def write(self, store: StateStore, count: int, key: SessionKey = KEY) -> None:
        """`count` more versions of a session; version n has the state b"n"."""
        async with store.hold(key) as lease:
            head = await store.head(key)
            newest = head.number if head else 0
            for number in range(newest, newest + count):
                self.clock.pass_(0.001)
                await self.commit(store, lease, number, b"%d" % (number + 1))

    def run(self, test: Callable[[StateStore], Awaitable[None]], **options: Any) -> None:
        """Run `test` on an open store, which must be healthy afterwards."""

        async def main() -> None:
            async with self.open(**options) as store:
                await test(store)
                assert await store.fsck() == []

        asyncio.run(main())


_REDIS = [pytest.param(kind, marks=pytest.mark.redis) for kind in ("redis", "cluster")]


@pytest.fixture(params=["memory", "sqlite", *_REDIS])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """A fresh, empty store of each kind."""
    return make_bench(request, tmp_path, request.param)


@pytest.fixture(params=["sqlite", _REDIS[0]])
def shared_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """Stores that several handles or processes can share."""
    return make_bench(request, tmp_path, request.param)


def make_bench(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> Bench:
    number = next(_numbers)
    if kind == "memory":
        return Bench("memory:", kind)
    if kind == "sqlite":
        return Bench(f"sqlite://{tmp_path}/{number}.sqlite", kind)
    server: RedisServer = request.getfixturevalue("redis_server" if kind == "redis" else "redis_cluster")
    return Bench(f"{server.url}?prefix=t{number}{'&cluster=1' if kind == 'cluster' else ''}", kind)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bench_sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """A SQLite file."""
    return make_bench(request, tmp_path, "sqlite")


@pytest.fixture
def bench_redis(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """A prefix of its own on the common server."""
    return make_bench(request, tmp_path, "redis")
