"""Several processes on one store, and processes that are killed while they commit."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nested_runtime.store.base import SessionKey, StateStore
from nested_runtime.store.url import open_store

WORKER = Path(__file__).with_name("store_worker.py")
KEY = SessionKey("acme", "shared")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers on a store; whatever becomes of the test, they end and their pipes are closed."""
    with ExitStack() as workers:

        def worker(url: str, *args: str) -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            command = [sys.executable, str(WORKER), url, *args]
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            workers.enter_context(process)  # closes the pipes and waits
            workers.callback(process.kill)
            return process

        yield worker


async def check(store: StateStore, newest: int) -> None:
    versions = await store.versions(KEY)
    assert [version.number for version in versions] == list(range(newest, max(newest - 8, 0), -1))
    for version in versions:
        assert (await store.load(KEY, version.number))[1] == version.number.to_bytes(4, "big") * 75_000
    assert await store.fsck() == []


def test_processes_share_a_new_store(shared_bench: Any, start: Start) -> None:
    """They create it at the same moment and take turns on one session; no turn is lost."""
    workers = [start(shared_bench.url, "turns", "15") for _ in range(3)]
    for worker in workers:
        _, errors = worker.communicate(timeout=100)
        assert worker.returncode == 0, errors

    async def main() -> None:
        async with open_store(shared_bench.url) as store:
            await check(store, 45)

    asyncio.run(main())


@pytest.mark.parametrize("kills", [8])
def test_a_killed_writer_leaves_whole_versions(shared_bench: Any, start: Start, kills: int) -> None:
    """SIGKILL at random moments of commits: every version it printed is there, at most one more, each of them whole."""
    luck = random.Random(5)

    async def check_after(printed: int) -> int:
        async with open_store(shared_bench.url) as store:
            head = await store.head(KEY)
            newest = head.number if head else 0
            assert newest in (printed, printed + 1)
            await check(store, newest)
            return newest

    newest = 0
    for _ in range(kills):
        worker = start(shared_bench.url, "forever")
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(luck.uniform(0.0, 0.25))
        worker.kill()
        output, errors = worker.communicate()
        assert "Traceback" not in errors, errors
        newest = asyncio.run(check_after(max([newest, *map(int, output.split())])))
    assert newest > kills


def test_a_stopped_holder_is_fenced(shared_bench: Any, start: Start) -> None:
    """SIGSTOP past the lease, somebody else commits, SIGCONT: the late commit is refused."""
    worker = start(shared_bench.url, "pause")
    assert worker.stdout is not None
    assert worker.stdout.readline() == "leased\n"
    time.sleep(0.7)  # renewed in the background: still held
    worker.send_signal(signal.SIGSTOP)

    async def main() -> None:
        async with open_store(shared_bench.url) as store:
            async with store.hold(KEY, wait=10) as lease:
                draft = shared_bench.draft()
                await store.commit(lease, 0, (1).to_bytes(4, "big") * 75_000, draft)
                worker.send_signal(signal.SIGCONT)
                output, errors = await asyncio.to_thread(worker.communicate, "go\n", 20)
                assert output == "lease_lost\n", errors
            await check(store, 1)

    asyncio.run(main())
