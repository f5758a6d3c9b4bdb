"""Random histories, the same on every store: whatever happens, all of them answer alike (and as a plain model says)."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from nested_runtime.errors import NestedError, VersionConflict
from nested_runtime.store.base import Draft, Lease, Limits, SessionKey, StateStore, StoredAnswer, Version
from nested_runtime.store.url import open_store

KEYS = [SessionKey("a", "x"), SessionKey("a", "y"), SessionKey("b", "x")]
LIMITS = Limits(retain=3, snapshots_per_session=2, answers_per_session=2, sessions_per_tenant=2)
keys = st.sampled_from(KEYS)
numbers = itertools.count()


class Histories(RuleBasedStateMachine):
    """Runs each step on all stores and compares what they say."""

    urls: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_800_000_000.0
        self.folder = tempfile.mkdtemp()
        self.runner = asyncio.Runner()
        number = next(numbers)
        self.stores: list[StateStore] = [
            open_store(url.format(folder=self.folder, number=number), clock=lambda: self.now, limits=LIMITS, ttl=100)
            for url in self.urls
        ]
        for store in self.stores:
            self.runner.run(store.open())
        self.leases: list[tuple[Lease, ...]] = []  # per step, one of each store
        self.snapshots: list[tuple[SessionKey, tuple[str, ...]]] = []
        self.heads: dict[SessionKey, int] = dict.fromkeys(KEYS, 0)  # the plain model
        self.used: dict[SessionKey, float] = {}
        self.fences: dict[SessionKey, tuple[int, ...]] = {}

    def teardown(self) -> None:
        for store in self.stores:
            assert self.runner.run(store.fsck()) == []
            self.runner.run(store.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    def all(self, calls: list[Awaitable[Any]]) -> tuple[Any, ...] | type[NestedError]:
        """The results, or the class of the error that all of them raised."""

        async def outcome(call: Awaitable[Any]) -> Any:
            try:
                return await call
            except NestedError as error:
                return type(error)

        async def main() -> list[Any]:
            return [await outcome(call) for call in calls]

        results = self.runner.run(main())
        errors = {result if isinstance(result, type) else None for result in results}
        assert len(errors) == 1, results
        return next(iter(errors)) or tuple(results)

    def same(self, calls: list[Awaitable[Any]]) -> Any:
        """The one result or error class all of them gave."""
        results = self.all(calls)
        if isinstance(results, type):
            return results
        assert all(result == results[0] for result in results), results
        return results[0]

    @rule(key=keys)
    def lease(self, key: SessionKey) -> None:
        leases = self.all([store.lease(key, ttl=10) for store in self.stores])
        if isinstance(leases, tuple):
            fences = tuple(lease.fence for lease in leases)
            assert all(new > old for new, old in zip(fences, self.fences.get(key, (0,) * len(fences)), strict=True))
            self.fences[key] = fences
            self.used[key] = self.now
            self.leases.append(leases)

    @rule(data=st.data(), stale=st.integers(0, 3), size=st.integers(0, 50), name=st.sampled_from([None, "p", "q", "r"]))
    def commit(self, data: st.DataObject, stale: int, size: int, name: str | None) -> None:
        if not self.leases:
            return
        leases = data.draw(st.sampled_from(self.leases))
        key = leases[0].key
        parent = max(self.heads[key] - stale % 2, 0)
        draft = Draft(kind="turn", tokens=size, digest="d", fingerprint="f")
        answer = StoredAnswer(name, "body", b"answer") if name else None
        made = self.same(
            [
                store.commit(lease, parent, b"s" * size, draft, answer)
                for store, lease in zip(self.stores, leases, strict=True)
            ]
        )
        if isinstance(made, Version):
            assert made.number == parent + 1 == self.heads[key] + 1
            assert leases[0].fence == self.fences[key][0]  # only the newest lease may commit
            self.heads[key] = made.number
            self.used[key] = self.now
        elif made is VersionConflict:
            assert parent != self.heads[key]

    @rule(data=st.data(), renew=st.booleans())
    def renew_or_release(self, data: st.DataObject, renew: bool) -> None:
        if not self.leases:
            return
        leases = data.draw(st.sampled_from(self.leases))
        pairs = list(zip(self.stores, leases, strict=True))
        if not renew:
            self.all([store.release(lease) for store, lease in pairs])
        elif isinstance(self.all([store.renew(lease) for store, lease in pairs]), tuple):
            self.used[leases[0].key] = self.now

    @rule(key=keys, number=st.one_of(st.none(), st.integers(0, 12)))
    def snapshot(self, key: SessionKey, number: int | None) -> None:
        made = self.all([store.snapshot(key, number) for store in self.stores])
        if isinstance(made, tuple):
            assert len({snapshot.version for snapshot in made}) == 1
            self.snapshots.append((key, tuple(snapshot.id for snapshot in made)))

    @rule(data=st.data(), delete=st.booleans())
    def use_snapshot(self, data: st.DataObject, delete: bool) -> None:
        if not self.snapshots:
            return
        key, ids = data.draw(st.sampled_from(self.snapshots))
        pairs = list(zip(self.stores, ids, strict=True))
        if delete:
            self.same([store.delete_snapshot(key, made) for store, made in pairs])
        else:
            self.same([store.load(key, snapshot=made) for store, made in pairs])

    @rule(key=keys)
    def delete(self, key: SessionKey) -> None:
        assert self.same([store.delete(key) for store in self.stores]) == bool(self.heads[key])
        self.heads[key] = 0

    @rule()
    def erase(self) -> None:
        self.same([store.erase("a") for store in self.stores])
        self.heads.update(dict.fromkeys(KEYS[:2], 0))

    @rule(seconds=st.sampled_from([1, 9, 10, 99, 100]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        self.same([store.sweep() for store in self.stores])

    @invariant()
    def all_look_alike(self) -> None:
        infos = self.same([store.sessions() for store in self.stores])
        alive = {info.key: info.head.number for info in infos.sessions}
        for key in KEYS:
            if key not in alive and self.heads[key]:
                assert self.now - self.used[key] >= 100
                self.heads[key] = 0  # expired
            assert alive.get(key, 0) == self.heads[key]
            versions = self.same([store.versions(key) for store in self.stores])
            for version in versions:
                assert self.same([store.load(key, version.number) for store in self.stores])[0] == version
            for name in ("p", "q", "r"):
                self.same([store.answer(key, name) for store in self.stores])
        self.same([store.usage() for store in self.stores])


FAST = settings(max_examples=10, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.redis
def test_all_stores_answer_alike(redis_server: Any) -> None:
    class Machine(Histories):
        urls = ("memory:", "sqlite://{folder}/s.sqlite", f"{redis_server.url}?prefix=h{{number}}")

    run_state_machine_as_test(Machine, settings=FAST)


def test_memory_and_sqlite_answer_alike() -> None:
    class Machine(Histories):
        urls = ("memory:", "sqlite://{folder}/s.sqlite")

    run_state_machine_as_test(Machine, settings=settings(FAST, max_examples=15))


def test_memory_follows_the_model() -> None:
    class Machine(Histories):
        urls = ("memory:",)

    run_state_machine_as_test(Machine, settings=settings(FAST, max_examples=50, stateful_step_count=50))
