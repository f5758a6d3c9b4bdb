"""A process that works on a store: `python store_worker.py URL MODE ...`. Started by the tests of this folder."""

from __future__ import annotations

import asyncio
import sys

from nested_runtime.errors import Conflict, VersionConflict
from nested_runtime.store.base import Draft, SessionKey
from nested_runtime.store.url import open_store

KEY = SessionKey("acme", "shared")
DRAFT = Draft(kind="turn", tokens=0, digest="", fingerprint="fp")


def state_of(number: int) -> bytes:
    """300 kB that tell their version from every byte on."""
    return number.to_bytes(4, "big") * 75_000


async def turns(url: str, count: int) -> None:
    """Commit `count` versions, each under its own lease, beside other processes."""
    async with open_store(url) as store:
        for _ in range(count):
            async with store.hold(KEY, wait=60) as lease:
                head = await store.head(KEY)
                number = head.number if head else 0
                await store.commit(lease, number, state_of(number + 1), DRAFT)


async def forever(url: str) -> None:
    """Commit until killed; print each version once it is durable."""
    async with open_store(url) as store:
        head = await store.head(KEY)
        number = head.number if head else 0
        print("ready", flush=True)
        while True:
            async with store.hold(KEY, ttl=0.5, wait=5) as lease:
                try:
                    await store.commit(lease, number, state_of(number + 1), DRAFT)
                except VersionConflict as error:
                    print("conflict", error, flush=True)
            number += 1
            print(number, flush=True)


async def pause(url: str) -> None:
    """Hold the session; once told to, commit and print what became of it."""
    async with open_store(url) as store, store.hold(KEY, ttl=0.3) as lease:
        print("leased", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        try:
            await store.commit(lease, 0, state_of(1), DRAFT)
            print("committed", flush=True)
        except Conflict as error:
            print(error.code, flush=True)


if __name__ == "__main__":
    mode, url = sys.argv[2], sys.argv[1]
    asyncio.run(turns(url, int(sys.argv[3])) if mode == "turns" else {"forever": forever, "pause": pause}[mode](url))
