"""The StateStore contract on leases and races, on every store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nested_runtime.errors import (
    LeaseLost,
    SessionBusy,
    VersionConflict,
)
from nested_runtime.store.base import Lease, SessionKey, StateStore

KEY = SessionKey("acme", "alice")
OTHER = SessionKey("acme", "bob")


def test_lease_is_exclusive_and_fences_grow(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        first = await store.lease(KEY)
        with pytest.raises(SessionBusy):
            await store.lease(KEY)
        with pytest.raises(SessionBusy):
            await store.lease(KEY, wait=0.05)
        other = await store.lease(OTHER)
        await store.release(first)
        await store.release(first)
        second = await store.lease(KEY)
        assert second.fence > first.fence
        await store.release(first)  # no longer ours: ignored
        with pytest.raises(SessionBusy):
            await store.lease(KEY)
        with pytest.raises(LeaseLost):
            await bench.commit(store, first, 0, b"stale")
        with pytest.raises(LeaseLost):
            await store.renew(first)
        assert (await bench.commit(store, second, 0, b"1")).number == 1
        assert (await bench.commit(store, other, 0, b"1")).number == 1

    bench.run(test)


def test_lease_expires_and_the_late_holder_is_fenced(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        late = await store.lease(KEY, ttl=10)
        bench.clock.pass_(9)
        renewed = await store.renew(late)
        assert (renewed.fence, renewed.expires) == (late.fence, pytest.approx(bench.clock.now + 10))
        bench.clock.pass_(9)
        assert (await bench.commit(store, late, 0, b"1")).number == 1
        bench.clock.pass_(1)
        with pytest.raises(LeaseLost):  # expired, although nobody else has it
            await bench.commit(store, late, 1, b"2")
        with pytest.raises(LeaseLost):
            await store.renew(late)
        taker = await store.lease(KEY)
        assert taker.fence > late.fence
        with pytest.raises(LeaseLost):
            await bench.commit(store, late, 1, b"2")
        await bench.commit(store, taker, 1, b"2")

    bench.run(test)


def test_waiters_get_the_lease_in_order(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        order: list[int] = []

        async def turn(number: int) -> None:
            async with store.hold(KEY, wait=20):
                order.append(number)

        held = await store.lease(KEY)
        turns = []
        for number in range(5):
            turns.append(asyncio.create_task(turn(number)))
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert order == []
        await store.release(held)
        await asyncio.gather(*turns)
        assert order == [0, 1, 2, 3, 4]
        assert not store._turnstile._gates

    bench.run(test)


def test_a_cancelled_waiter_leaves_no_lease(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        for delay in (0.0, 0.0005, 0.001, 0.002, 0.005):
            taking = asyncio.create_task(store.lease(KEY))
            await asyncio.sleep(delay)
            if not taking.done():
                taking.cancel()
            for lease in await asyncio.gather(taking, return_exceptions=True):
                if not isinstance(lease, BaseException):
                    await store.release(lease)
            await store.release(await store.lease(KEY, wait=5))

    bench.run(test)


def test_hold_renews_and_releases(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        renewed = asyncio.Event()
        renew = store.renew

        async def told(lease: Lease) -> Lease:
            extended = await renew(lease)
            renewed.set()
            return extended

        store.renew = told
        async with store.hold(KEY, ttl=0.15) as lease:
            for _ in range(5):  # the clock passes two ttls, never a whole one without a renewal that began after it
                renewed.clear()
                bench.clock.pass_(0.07)
                await renewed.wait()
            await bench.commit(store, lease, 0, b"1")
        with pytest.raises(ZeroDivisionError):
            async with store.hold(KEY):
                raise ZeroDivisionError
        await store.release(await store.lease(KEY))

    bench.run(test)


def test_racing_commits_have_one_winner(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        lease = await store.lease(KEY)
        for parent in range(3):
            racing = (bench.commit(store, lease, parent, b"%d" % number) for number in range(12))
            results = await asyncio.gather(*racing, return_exceptions=True)
            won = [result for result in results if not isinstance(result, BaseException)]
            assert len(won) == 1
            assert sum(isinstance(result, VersionConflict) for result in results) == 11
            assert await store.head(KEY) == won[0]

    bench.run(test)


def test_racing_turns_all_commit_in_turn(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        async def turn(number: int) -> None:
            async with store.hold(KEY, wait=20) as lease:
                head = await store.head(KEY)
                await bench.commit(store, lease, head.number if head else 0, b"%d" % number)

        await asyncio.gather(*map(turn, range(12)))
        head = await store.head(KEY)
        assert head is not None
        assert head.number == 12

    bench.run(test)
