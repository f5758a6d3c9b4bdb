"""The StateStore contract, on every store."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Any

import pytest

from nested_runtime.errors import (
    ConfigError,
    Conflict,
    LeaseLost,
    NotFound,
    Overloaded,
    RequestError,
    StoreUnavailable,
    VersionConflict,
)
from nested_runtime.store.base import Limits, SessionKey, StateStore, StoredAnswer, Usage

KEY = SessionKey("acme", "alice")
OTHER = SessionKey("acme", "bob")


# ---- versions ------------------------------------------------------------------------------------------------------


def test_commit_and_load(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        assert await store.head(KEY) is None
        assert await store.versions(KEY) == [] == await store.snapshots(KEY)
        assert await store.info(KEY) is None
        with pytest.raises(NotFound):
            await store.load(KEY)
        state = os.urandom(100_000) + bytes(100_000)
        draft = bench.draft(state, pending=7, chain="c", root="r", messages=2, learned_tokens=9, model="hope-nano")
        draft = replace(draft, extra={"levels": [{"updates": 3, "norm": 0.1}], "ü": None})
        async with store.hold(KEY) as lease:
            first = await store.commit(lease, 0, state, draft)
            second = await store.commit(lease, 1, b"", replace(draft, source=1, kind="restore"))
        assert (first.number, first.parent, first.created) == (1, None, bench.clock.now)
        assert (second.number, second.parent, second.source, second.kind) == (2, 1, 1, "restore")
        assert (first.pending, first.extra) == (7, draft.extra)
        assert 100_000 < first.size < 102_000
        assert await store.head(KEY) == second
        assert await store.versions(KEY) == [second, first]
        assert await store.load(KEY) == (second, b"")
        assert await store.load(KEY, 1) == (first, state)
        with pytest.raises(NotFound, match="version 3"):
            await store.load(KEY, 3)
        with pytest.raises(NotFound):
            await store.load(KEY, 0)
        info = await store.info(KEY)
        assert info is not None
        assert info.head == second
        assert (info.versions, info.snapshots, info.bytes) == (2, 0, first.size + second.size)

    bench.run(test)


def test_stale_parent_changes_nothing(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        await bench.write(store, 2)
        async with store.hold(KEY) as lease:
            for parent in (0, 1, 3):
                with pytest.raises(VersionConflict, match="version 2"):
                    await bench.commit(store, lease, parent, b"x", StoredAnswer("k", "b", b"a"))
        assert await store.answer(KEY, "k") is None
        assert (await store.load(KEY))[1] == b"2"
        async with store.hold(OTHER) as lease:
            with pytest.raises(VersionConflict, match="version 0"):
                await bench.commit(store, lease, 1, b"x")
        assert await store.head(OTHER) is None

    bench.run(test)


def test_retains_the_newest_versions(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        await bench.write(store, 3)
        kept = await store.snapshot(KEY, 2, "good")
        await bench.write(store, 5)
        assert [version.number for version in await store.versions(KEY)] == [8, 7, 6, 2]
        assert (await store.load(KEY, 6))[1] == b"6"
        with pytest.raises(NotFound):
            await store.load(KEY, 5)
        assert (await store.load(KEY, snapshot=kept.id))[1] == b"2"
        assert (await store.load(KEY, 7, snapshot=kept.id))[1] == b"2"
        assert await store.delete_snapshot(KEY, kept.id)
        assert [version.number for version in await store.versions(KEY)] == [8, 7, 6]
        with pytest.raises(NotFound, match=kept.id):
            await store.load(KEY, snapshot=kept.id)

    bench.run(test, limits=Limits(retain=3))


@pytest.mark.parametrize(
    "key",
    [
        SessionKey("a", "b:c}{d"),
        SessionKey("a:b", "c}{d"),
        SessionKey("a", "{"),
        SessionKey("ü%/*?[", "\u2028💾 '\";--"),
        SessionKey("x" * 256, "💾" * 256),
        SessionKey("a.b", "c"),
        SessionKey("a", "b.c"),
    ],
)
def test_any_text_is_a_key(bench: Any, key: SessionKey) -> None:
    async def test(store: StateStore) -> None:
        await bench.write(store, 1, key)
        await bench.write(store, 2, SessionKey(key.tenant, "neighbour"))
        info = await store.info(key)
        assert info is not None
        assert (info.key, info.head.number) == (key, 1)
        assert {info.key.session for info in (await store.sessions(key.tenant)).sessions} == {key.session, "neighbour"}
        assert await store.delete(key)
        assert await store.head(key) is None
        assert await store.head(SessionKey(key.tenant, "neighbour"))

    bench.run(test)


@pytest.mark.parametrize("text", ["", "x" * 257, "a\nb", "a\x00", "\x7f", "\x85", "\ud800", 7, None])
def test_key_is_checked(text: Any) -> None:
    with pytest.raises(RequestError) as refused:
        SessionKey("acme", text)
    assert refused.value.param == "session_id"
    with pytest.raises(RequestError):
        SessionKey(text, "alice")


@pytest.mark.parametrize("number", [-1, 0, 1 << 53, 10**30])
def test_impossible_versions_do_not_exist(bench: Any, number: int) -> None:
    async def test(store: StateStore) -> None:
        await bench.write(store, 1)
        with pytest.raises(NotFound):
            await store.load(KEY, number)
        with pytest.raises(NotFound):
            await store.snapshot(KEY, number)
        async with store.hold(KEY) as lease:
            with pytest.raises(VersionConflict):
                await bench.commit(store, lease, number, b"x")

    bench.run(test)


def test_hostile_text_is_refused(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        await bench.write(store, 1)
        for bad in ("\ud800", "a\x00b", "x" * 257):
            for call in (
                store.load(KEY, snapshot=bad),
                store.snapshot(KEY, label=bad),
                store.delete_snapshot(KEY, bad),
                store.answer(KEY, bad),
                store.sessions(bad),
                store.erase(bad),
            ):
                with pytest.raises(RequestError):
                    await call
        async with store.hold(KEY) as lease:
            for extra in ({"norm": float("nan")}, {"x": object()}, {"x": "x" * 70_000}):
                with pytest.raises(RequestError):
                    await store.commit(lease, 1, b"", replace(bench.draft(), extra=extra))
            made = await store.commit(lease, 1, b"", replace(bench.draft(), extra={"odd": ("\ud800", 1)}))
            assert await store.head(KEY) == made

    bench.run(test)


# ---- answers -------------------------------------------------------------------------------------------------------


def test_answer_is_committed_with_its_version(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        answer = StoredAnswer("key-1", "body", b'{"a":\n1}\x00\xff')
        async with store.hold(KEY) as lease:
            assert await store.answer(KEY, "key-1") is None
            await bench.commit(store, lease, 0, b"1", answer)
            assert await store.answer(KEY, "key-1") == replace(answer, version=1)
            assert await store.answer(OTHER, "key-1") is None
            with pytest.raises(Conflict, match="key-1"):
                await bench.commit(store, lease, 1, b"2", answer)
            assert (await store.head(KEY)).number == 1  # type: ignore[union-attr]
            await bench.commit(store, lease, 1, b"2", StoredAnswer("key-2", "body", b""))
        bench.clock.pass_(100)
        assert await store.answer(KEY, "key-1") is None
        async with store.hold(KEY) as lease:
            await bench.commit(store, lease, 2, b"3", replace(answer, body_digest="other"))
        assert await store.answer(KEY, "key-1") == replace(answer, body_digest="other", version=3)
        await store.sweep()
        assert await store.answer(KEY, "key-2") is None

    bench.run(test, answer_ttl=100)


def test_answers_are_bounded(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        async with store.hold(KEY) as lease:
            for number in range(6):
                bench.clock.pass_(1)
                await bench.commit(store, lease, number, b"x", StoredAnswer(f"k{number}", "b", b""))
        kept = [number for number in range(6) if await store.answer(KEY, f"k{number}")]
        assert kept == [3, 4, 5]

    bench.run(test, limits=Limits(answers_per_session=3))


# ---- snapshots -----------------------------------------------------------------------------------------------------


def test_snapshots(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        with pytest.raises(NotFound):
            await store.snapshot(KEY)
        await bench.write(store, 3)
        first = await store.snapshot(KEY, 2, 'Zürich "1"')
        bench.clock.pass_(1)
        second = await store.snapshot(KEY)
        assert (first.version, first.label, second.version, second.label) == (2, 'Zürich "1"', 3, "")
        assert await store.snapshots(KEY) == [first, second]
        with pytest.raises(NotFound, match="version 9"):
            await store.snapshot(KEY, 9)
        with pytest.raises(NotFound):
            await store.snapshot(KEY, 0)
        with pytest.raises(RequestError, match="maximum of 2"):
            await store.snapshot(KEY)
        with pytest.raises(RequestError, match="label"):
            await store.snapshot(KEY, label="x" * 257)
        with pytest.raises(NotFound):
            await store.load(OTHER, snapshot=first.id)
        assert not await store.delete_snapshot(OTHER, first.id)
        assert await store.delete_snapshot(KEY, first.id)
        assert not await store.delete_snapshot(KEY, first.id)
        info = await store.info(KEY)
        assert info is not None
        assert info.snapshots == 1

    bench.run(test, limits=Limits(snapshots_per_session=2))


# ---- deletion ------------------------------------------------------------------------------------------------------


def test_delete_erases_everything_and_fences_the_holder(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        lease = await store.lease(KEY)
        await bench.commit(store, lease, 0, b"1", StoredAnswer("k", "b", b"a"))
        made = await store.snapshot(KEY)
        assert await store.delete(KEY)
        assert not await store.delete(KEY)
        assert await store.head(KEY) is None
        assert await store.versions(KEY) == [] == await store.snapshots(KEY)
        assert await store.answer(KEY, "k") is None
        assert (await store.sessions()).sessions == ()
        with pytest.raises(LeaseLost):
            await bench.commit(store, lease, 1, b"2")
        with pytest.raises(LeaseLost):
            await store.renew(lease)
        again = await store.lease(KEY)
        assert again.fence > lease.fence
        with pytest.raises(LeaseLost):
            await bench.commit(store, lease, 0, b"2")
        fresh = await bench.commit(store, again, 0, b"fresh")
        assert (fresh.number, fresh.parent) == (1, None)
        with pytest.raises(NotFound):
            await store.load(KEY, snapshot=made.id)

    bench.run(test)


def test_delete_fences_a_first_turn(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        lease = await store.lease(KEY)
        assert not await store.delete(KEY)
        with pytest.raises(LeaseLost):
            await bench.commit(store, lease, 0, b"1")
        assert await store.head(KEY) is None

    bench.run(test)


def test_erase_a_tenant(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        stranger = SessionKey("acme2", "alice")
        for key in (KEY, OTHER, stranger):
            await bench.write(store, 1, key)
        running = await store.lease(SessionKey("acme", "first turn"))
        assert await store.erase("acme") == 2
        assert await store.erase("acme") == 0
        assert await store.usage("acme") == Usage(0, 0, 0, 0)
        assert [info.key for info in (await store.sessions()).sessions] == [stranger]
        with pytest.raises(LeaseLost):
            await bench.commit(store, running, 0, b"1")

    bench.run(test)


def test_idle_sessions_expire(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        await bench.write(store, 2)
        await bench.write(store, 1, OTHER)
        bench.clock.pass_(59)
        touched = await store.lease(OTHER)
        bench.clock.pass_(1)
        assert (await store.head(KEY), await store.info(KEY)) == (None, None)
        with pytest.raises(NotFound):
            await store.load(KEY)
        with pytest.raises(NotFound):
            await store.snapshot(KEY, 1)
        assert [info.key for info in (await store.sessions()).sessions] == [OTHER]
        async with store.hold(KEY) as lease:
            assert (await bench.commit(store, lease, 0, b"fresh")).number == 1
        assert len(await store.versions(KEY)) == 1
        await store.release(touched)
        bench.clock.pass_(60)
        assert await store.sweep() == 2
        assert await store.sweep() == 0
        assert await store.usage() == Usage(0, 0, 0, 0)
        with pytest.raises(ConfigError, match="ttl"):
            await store.lease(KEY, ttl=61)

    bench.run(test, ttl=60)


# ---- listing, limits, life -----------------------------------------------------------------------------------------


def test_pages_and_usage(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        keys = [SessionKey(tenant, f"s{number:02}") for tenant in ("a", "b", "ü") for number in range(7)]
        for key in reversed(keys):
            await bench.write(store, 1, key)
        await store.snapshot(keys[0])
        for limit in (1, 5, 7, 21, 22):
            for tenant in (None, "b", "nobody"):
                seen: list[SessionKey] = []
                cursor: str | None = None
                while True:
                    page = await store.sessions(tenant, cursor=cursor, limit=limit)
                    seen += [info.key for info in page.sessions]
                    cursor = page.cursor
                    if cursor is None:
                        break
                    assert len(page.sessions) == limit
                assert seen == [key for key in keys if tenant in (None, key.tenant)]
        usage = await store.usage()
        assert (usage.sessions, usage.versions, usage.snapshots) == (21, 21, 1)
        assert (await store.usage("a")).bytes * 3 == usage.bytes
        for cursor in ("x", "e30=", "\u00fc"):
            with pytest.raises(RequestError, match="cursor"):
                await store.sessions(cursor=cursor)
        with pytest.raises(RequestError, match="limit"):
            await store.sessions(limit=0)

    bench.run(test)


def test_limits(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        await bench.write(store, 1)
        await store.release(await store.lease(OTHER))  # leased, never written: takes no room
        await bench.write(store, 1, SessionKey("acme", "carol"))
        with pytest.raises(Overloaded, match="maximum of 2"):
            await store.lease(OTHER)
        await bench.write(store, 1, SessionKey("other", "bob"))
        await store.delete(KEY)
        async with store.hold(OTHER) as lease:
            await bench.commit(store, lease, 0, os.urandom(3000))
            await bench.commit(store, lease, 1, os.urandom(3000))
            with pytest.raises(RequestError, match="bytes_per_session"):
                await bench.commit(store, lease, 2, os.urandom(5000))
            with pytest.raises(RequestError, match="state_bytes"):
                await bench.commit(store, lease, 2, bytes(6001))
            with pytest.raises(RequestError, match="answer_bytes"):
                await bench.commit(store, lease, 2, b"3", StoredAnswer("key", "body", bytes(501)))
            assert len(await store.versions(OTHER)) == 2

    limits = Limits(sessions_per_tenant=2, bytes_per_session=10_000, state_bytes=6000, answer_bytes=500)
    bench.run(test, limits=limits)


def test_room_is_checked_when_a_session_is_born(bench: Any) -> None:
    async def test(store: StateStore) -> None:
        leases = [
            lease
            for lease in await asyncio.gather(
                *(store.lease(SessionKey("acme", f"s{number}")) for number in range(6)), return_exceptions=True
            )
            if not isinstance(lease, BaseException)
        ]
        assert len(leases) >= 3
        results = await asyncio.gather(
            *(bench.commit(store, lease, 0, b"1") for lease in leases), return_exceptions=True
        )
        assert sum(not isinstance(result, BaseException) for result in results) == 3
        assert all(isinstance(result, Overloaded) for result in results if isinstance(result, BaseException))
        assert (await store.usage("acme")).sessions == 3

    bench.run(test, limits=Limits(sessions_per_tenant=3))


def test_life(bench: Any) -> None:
    async def main() -> None:
        store = bench.open()
        if bench.kind != "memory":
            with pytest.raises(StoreUnavailable, match="not open"):
                await store.head(KEY)
        async with store:
            await store.ping()
            assert store.durability == {"sqlite": "fsynced"}.get(bench.kind, "memory")
            await bench.write(store, 1)
        await store.close()
        async with store:
            assert (await store.load(KEY))[1] == b"1"

    asyncio.run(main())


def test_options_are_checked() -> None:
    from nested_runtime.store.url import open_store

    for url in ("", "memory", "mongo://x", "sqlite://x.db", "sqlite:x.db", "sqlite:///", "redis:///", "memory:x"):
        with pytest.raises(ConfigError, match="store URL"):
            open_store(url)
    with pytest.raises(ConfigError, match="ttl"):
        open_store("memory:", ttl=0)
    with pytest.raises(ConfigError, match="retain"):
        Limits(retain=0)
