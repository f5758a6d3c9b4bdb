"""RedisStore: sessions shared by many servers, on Redis 6.2 or newer, alone or as a cluster.

A session's keys share one slot and every change of them is one Lua script. The index of a tenant's sessions lies in
another slot: a session is entered before its first commit and removed after its deletion, so the index may name a
session that is not there (readers skip it, `sweep` removes it) but never misses one.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from typing import Any, Self

from nested_runtime.errors import ConfigError, StoreUnavailable
from nested_runtime.store import redis_scripts as scripts
from nested_runtime.store import rules
from nested_runtime.store.base import StateStore
from nested_runtime.store.records import (
    Lease,
    SessionInfo,
    SessionKey,
    Snapshot,
    StoredAnswer,
    Usage,
    Version,
)
from nested_runtime.store.redis_link import RedisLink

__all__ = ["RedisStore"]

GRACE = 3_600.0  # seconds an index entry without a session may wait for its first commit
BATCH = 16  # sessions looked at concurrently


class RedisStore(StateStore):
    """The shared store. `timeout` bounds connecting and each reply."""

    def __init__(
        self, url: str, *, timeout: float = 3.0, clock: Callable[[], float] | None = None, **options: Any
    ) -> None:
        super().__init__(clock=clock, **options)
        self._link = RedisLink(url, timeout=timeout)
        self._keys = self._link.keys
        self._given_clock = clock
        self._reserved: dict[int, str] = {}  # by fence: stamps of sessions leased but never committed

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """`redis://[user:password@]host[:port][/db]`, `rediss://...` for TLS; `?cluster=1`, `?prefix=name`."""
        if not url.startswith(("redis://", "rediss://")):
            raise ConfigError(f"store URL {url!r} is impossible; write redis://host:port/db")
        return cls(url, **options)

    async def open(self) -> None:
        """See StateStore."""
        await self._link.open()

    async def close(self) -> None:
        """See StateStore."""
        await self._link.close()

    @property
    def durability(self) -> str:
        """As the server is configured now; falls back to "memory" when replicas or disk stop confirming."""
        return self._link.durability

    async def ping(self) -> None:
        """See StateStore. Looks at the durability again."""
        await self._link.detect()

    def _now(self) -> str:
        return "" if self._given_clock is None else f"{self._given_clock():.6f}"

    async def _eval(self, script: str, key: SessionKey, *args: str | bytes | float) -> Any:
        return await self._link.eval(script, self._keys.all(key), self._now(), self.ttl or 0, *args)

    # ---- leases -----------------------------------------------------------------------------------------------------

    async def _try_lease(self, key: SessionKey, ttl: float) -> Lease | None:
        reply = await self._eval(scripts.LEASE, key, ttl, uuid.uuid4().hex)
        if not reply:
            return None
        lease = Lease(key, int(reply[0]), ttl, float(reply[1]))
        if not reply[2]:
            try:
                self._reserved[lease.fence] = await self._reserve(key)
            except BaseException:
                await self.release(lease)
                raise
        return lease

    async def renew(self, lease: Lease) -> Lease:
        """See StateStore."""
        expires = await self._eval(scripts.RENEW, lease.key, lease.fence, lease.ttl)
        if expires is None:
            raise rules.lease_lost(lease)
        return replace(lease, expires=float(expires))

    async def release(self, lease: Lease) -> None:
        """See StateStore."""
        await self._eval(scripts.RELEASE, lease.key, lease.fence)
        stamp = self._reserved.pop(lease.fence, None)
        self._turnstile.wake(lease.key)
        if stamp is not None:
            await self._drop(lease.key, stamp, 0)

    # ---- the tenant's index -----------------------------------------------------------------------------------------

    async def _reserve(self, key: SessionKey) -> str:
        await self._link.command("ZADD", self._keys.tenants, 0, key.tenant)
        args = (self._now(), key.session, uuid.uuid4().hex, self.limits.sessions_per_tenant)
        stamp: bytes | None = await self._link.eval(scripts.RESERVE, self._keys.index(key.tenant), *args)
        if stamp is None:
            raise rules.too_many_sessions(key, self.limits)
        return stamp.decode()

    async def _drop(self, key: SessionKey, stamp: str, age: float) -> None:
        args = (self._now(), key.session, stamp, age)
        await self._link.eval(scripts.DROP, self._keys.index(key.tenant), *args)

    async def _stamp(self, key: SessionKey) -> str | None:
        found: bytes | None = await self._link.command("HGET", self._keys.index(key.tenant)[1], key.session)
        return found.decode() if found else None

    async def _names(self, index: str, after: str) -> AsyncIterator[list[str]]:
        """Names of an index in order, in batches."""
        while True:
            start = b"(" + after.encode() if after else "-"
            found = await self._link.command("ZRANGEBYLEX", index, start, "+", "LIMIT", 0, BATCH)
            if found:
                yield [name.decode() for name in found]
            if len(found) < BATCH:
                return
            after = found[-1].decode()

    async def _indexed(self, tenant: str | None, after: SessionKey | None = None) -> AsyncIterator[list[SessionKey]]:
        """Sessions that may exist, in order, in batches."""
        if tenant is None:
            tenants = [name async for batch in self._names(self._keys.tenants, "") for name in batch]
        else:
            tenants = [tenant]
        for name in tenants:
            if after is not None and name < after.tenant:
                continue
            start = after.session if after is not None and name == after.tenant else ""
            async for batch in self._names(self._keys.index(name)[0], start):
                yield [SessionKey(name, session) for session in batch]

    # ---- versions ---------------------------------------------------------------------------------------------------

    async def head(self, key: SessionKey) -> Version | None:
        """See StateStore."""
        info = await self.info(key)
        return info.head if info else None

    async def versions(self, key: SessionKey) -> list[Version]:
        """See StateStore."""
        found = [Version.from_json(record) for record in await self._eval(scripts.READ, key, "versions")]
        return sorted(found, key=lambda version: -version.number)

    async def _load(self, key: SessionKey, number: int | None, snapshot: str | None) -> tuple[Version, bytes] | None:
        if number is None:
            located = await self._eval(scripts.LOCATE, key, "", snapshot or "")
            if not located:
                return None
            number = int(located[0])
        # The state comes past Lua, which would copy it, yet in the same atomic step as its record.
        keys = [*self._keys.all(key), f"{self._keys.session(key)}:s:{number}"]
        located, state = await self._link.read(scripts.LOCATE, keys, self._now(), self.ttl or 0, number, "")
        return (Version.from_json(located[1]), state) if located and state is not None else None

    async def _commit(self, lease: Lease, version: Version, packed: bytes, answer: StoredAnswer | None) -> None:
        key, limits = lease.key, self.limits
        if version.parent is None:
            await self._reserve(key)
            self._reserved.pop(lease.fence, None)  # from here on the session may exist
        record = b""
        if answer is not None:
            header = json.dumps({"body_digest": answer.body_digest, "version": version.number})
            record = header.encode() + b"\n" + answer.answer
        commit_id = uuid.uuid4().hex
        reply = await self._link.commit(
            scripts.COMMIT,
            [*self._keys.all(key), f"{self._keys.session(key)}:staged:{commit_id}"],
            packed,
            *(self._now(), self.ttl or 0, lease.fence, version.parent or 0, version.to_json(), commit_id),
            *(limits.retain, limits.bytes_per_session, answer.key if answer else "", record),
            *(self.answer_ttl, limits.answers_per_session),
        )
        why = reply[0].decode()
        if why == "lease":
            raise rules.lease_lost(lease)
        if why == "version":
            raise rules.version_conflict(key, version.parent or 0, int(reply[1]))
        if why == "answered" and answer is not None:
            raise rules.answered(key, answer)
        if why == "bytes":
            raise rules.too_large(key, int(reply[1]), limits)
        if why != "ok":
            raise StoreUnavailable(f"{self._link.name} lost the staged state of session {key.session!r}; retry")

    async def _answer(self, key: SessionKey, answer_key: str) -> StoredAnswer | None:
        found = await self._eval(scripts.READ, key, "answer", answer_key)
        if not found:
            return None
        header, _, answer = found[0].partition(b"\n")
        return StoredAnswer(key=answer_key, answer=answer, **json.loads(header))

    # ---- snapshots --------------------------------------------------------------------------------------------------

    async def _snapshot(self, key: SessionKey, number: int | None, label: str) -> Snapshot:
        head = await self.head(key) if number is None else None
        made = rules.new_snapshot(number or (head.number if head else 0), label, self._clock())
        args = (made.version, made.id, json.dumps(asdict(made)), self.limits.snapshots_per_session)
        why = await self._eval(scripts.SNAPSHOT, key, *args)
        if why == b"missing":
            raise rules.no_version(key, number)
        if why == b"limit":
            raise rules.too_many_snapshots(key, self.limits)
        return made

    async def snapshots(self, key: SessionKey) -> list[Snapshot]:
        """See StateStore."""
        found = [Snapshot(**json.loads(record)) for record in await self._eval(scripts.READ, key, "snapshots")]
        return sorted(found, key=lambda made: (made.created, made.id))

    async def _delete_snapshot(self, key: SessionKey, snapshot: str) -> bool:
        return bool(await self._eval(scripts.UNSNAPSHOT, key, snapshot, self.limits.retain))

    # ---- sessions ---------------------------------------------------------------------------------------------------

    async def info(self, key: SessionKey) -> SessionInfo | None:
        """See StateStore."""
        found = await self._eval(scripts.INFO, key)
        if not found:
            return None
        created, updated, used = map(float, found[1:4])
        versions, snapshots, size = map(int, found[4:7])
        return SessionInfo(key, Version.from_json(found[0]), created, updated, used, versions, snapshots, size)

    async def _infos(self, tenant: str | None, after: SessionKey | None = None) -> AsyncIterator[SessionInfo]:
        async for batch in self._indexed(tenant, after):
            for info in await asyncio.gather(*map(self.info, batch)):
                if info is not None:
                    yield info

    async def _sessions(self, tenant: str | None, after: SessionKey | None, limit: int) -> tuple[SessionInfo, ...]:
        found: list[SessionInfo] = []
        async for info in self._infos(tenant, after):
            found.append(info)
            if len(found) == limit:
                break
        return tuple(found)

    async def usage(self, tenant: str | None = None) -> Usage:
        """See StateStore."""
        return rules.total([info async for info in self._infos(tenant)])

    async def delete(self, key: SessionKey) -> bool:
        """See StateStore."""
        stamp = await self._stamp(key)
        existed = bool(await self._eval(scripts.DELETE, key))
        self._turnstile.wake(key)
        if stamp is not None:
            await self._drop(key, stamp, 0)
        return existed

    async def _erase(self, tenant: str) -> int:
        return sum([sum(await asyncio.gather(*map(self.delete, batch))) async for batch in self._indexed(tenant)])

    async def sweep(self) -> int:
        """See StateStore."""
        return sum([sum(await asyncio.gather(*map(self._sweep, batch))) async for batch in self._indexed(None)])

    async def _sweep(self, key: SessionKey) -> bool:
        stamp = await self._stamp(key)
        found = await self._eval(scripts.SWEEP, key)
        if found != b"alive" and stamp is not None:
            await self._drop(key, stamp, 0 if found == b"expired" else GRACE)
        return bool(found == b"expired")

    async def _fsck(self) -> list[str]:
        return [
            f"{key.tenant!r}/{key.session!r}: is not in its tenant's index"
            async for key in self._link.session_keys()
            if await self._stamp(key) is None
        ]
