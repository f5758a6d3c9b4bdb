"""MemoryStore: everything in one process, gone with it. The reference of the semantics.

No method awaits between reading and writing, so on one event loop each of them is atomic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from nested_runtime.errors import ConfigError
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

__all__ = ["MemoryStore"]


@dataclass
class _Session:
    created: float
    used: float
    versions: dict[int, tuple[Version, bytes]] = field(default_factory=dict)  # oldest first
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    answers: dict[str, tuple[StoredAnswer, float]] = field(default_factory=dict)  # with the time it expires

    @property
    def head(self) -> int:
        return max(self.versions)

    @property
    def size(self) -> int:
        return sum(version.size for version, _ in self.versions.values())

    def prune(self, head: int, retain: int) -> list[int]:
        pinned = {snapshot.version for snapshot in self.snapshots.values()}
        return rules.prunable(self.versions, pinned, head, retain)


class MemoryStore(StateStore):
    """Dictionaries. For tests and for servers that promise no durability."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._kept: dict[SessionKey, _Session] = {}
        self._leases: dict[SessionKey, Lease] = {}
        self._fences = itertools.count(1)

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """`memory:`"""
        if url not in ("memory:", "memory://"):
            raise ConfigError(f"store URL {url!r} has more than a scheme; write memory:")
        return cls(**options)

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do: the contents stay as long as the object."""

    @property
    def durability(self) -> str:
        """Always "memory"."""
        return "memory"

    async def ping(self) -> None:
        """Always there."""

    def _get(self, key: SessionKey) -> _Session | None:
        session = self._kept.get(key)
        expired = session is not None and self.ttl is not None and session.used + self.ttl <= self._clock()
        return None if expired else session

    def _current(self, lease: Lease) -> bool:
        held = self._leases.get(lease.key)
        return held is not None and held.fence == lease.fence and held.expires > self._clock()

    def _check_room(self, key: SessionKey) -> None:
        if len(self._kept) < self.limits.sessions_per_tenant:
            return
        held = [other for other in self._kept if other.tenant == key.tenant and self._get(other)]
        if len(held) >= self.limits.sessions_per_tenant:
            raise rules.too_many_sessions(key, self.limits)

    async def _try_lease(self, key: SessionKey, ttl: float) -> Lease | None:
        now = self._clock()
        if key in self._leases and self._leases[key].expires > now:
            return None
        session = self._get(key)
        if session is None:
            self._kept.pop(key, None)
            self._check_room(key)
        else:
            session.used = now
        lease = self._leases[key] = Lease(key, next(self._fences), ttl, now + ttl)
        return lease

    async def renew(self, lease: Lease) -> Lease:
        """See StateStore."""
        if not self._current(lease):
            raise rules.lease_lost(lease)
        now = self._clock()
        renewed = self._leases[lease.key] = replace(lease, expires=now + lease.ttl)
        if lease.key in self._kept:
            self._kept[lease.key].used = now
        return renewed

    async def release(self, lease: Lease) -> None:
        """See StateStore."""
        if lease.key in self._leases and self._leases[lease.key].fence == lease.fence:
            del self._leases[lease.key]
        self._turnstile.wake(lease.key)

    async def head(self, key: SessionKey) -> Version | None:
        """See StateStore."""
        session = self._get(key)
        return session.versions[session.head][0] if session else None

    async def versions(self, key: SessionKey) -> list[Version]:
        """See StateStore."""
        session = self._get(key)
        return [version for version, _ in reversed(session.versions.values())] if session else []

    async def _load(self, key: SessionKey, number: int | None, snapshot: str | None) -> tuple[Version, bytes] | None:
        session = self._get(key)
        if session is None:
            return None
        if snapshot is not None:
            if snapshot not in session.snapshots:
                return None
            number = session.snapshots[snapshot].version
        return session.versions.get(session.head if number is None else number)

    async def _commit(self, lease: Lease, version: Version, packed: bytes, answer: StoredAnswer | None) -> None:
        now, key = self._clock(), lease.key
        if not self._current(lease):
            raise rules.lease_lost(lease)
        session = self._get(key)
        head = session.head if session else 0
        if head != (version.parent or 0):
            raise rules.version_conflict(key, version.parent or 0, head)
        if session is None:
            self._check_room(key)
            session = _Session(created=now, used=now)
        if answer is not None and answer.key in session.answers and session.answers[answer.key][1] > now:
            raise rules.answered(key, answer)
        gone = session.prune(version.number, self.limits.retain)
        size = session.size - sum(session.versions[number][0].size for number in gone) + version.size
        if size > self.limits.bytes_per_session:
            raise rules.too_large(key, size, self.limits)
        for number in gone:
            del session.versions[number]
        session.versions[version.number] = (version, packed)
        session.used = now
        if answer is not None:
            self._remember(session, replace(answer, version=version.number), now)
        self._kept[key] = session

    def _remember(self, session: _Session, answer: StoredAnswer, now: float) -> None:
        session.answers = {name: kept for name, kept in session.answers.items() if kept[1] > now}
        while len(session.answers) >= self.limits.answers_per_session:
            del session.answers[next(iter(session.answers))]
        session.answers[answer.key] = (answer, now + self.answer_ttl)

    async def _answer(self, key: SessionKey, answer_key: str) -> StoredAnswer | None:
        session = self._get(key)
        if session is None or answer_key not in session.answers:
            return None
        answer, expires = session.answers[answer_key]
        return answer if expires > self._clock() else None

    async def _snapshot(self, key: SessionKey, number: int | None, label: str) -> Snapshot:
        session = self._get(key)
        if session is None or (number is not None and number not in session.versions):
            raise rules.no_version(key, number)
        if len(session.snapshots) >= self.limits.snapshots_per_session:
            raise rules.too_many_snapshots(key, self.limits)
        made = rules.new_snapshot(session.head if number is None else number, label, self._clock())
        session.snapshots[made.id] = made
        return made

    async def snapshots(self, key: SessionKey) -> list[Snapshot]:
        """See StateStore."""
        session = self._get(key)
        return sorted(session.snapshots.values(), key=lambda made: (made.created, made.id)) if session else []

    async def _delete_snapshot(self, key: SessionKey, snapshot: str) -> bool:
        session = self._get(key)
        if session is None or session.snapshots.pop(snapshot, None) is None:
            return False
        for number in session.prune(session.head, self.limits.retain):
            del session.versions[number]
        return True

    def _info(self, key: SessionKey, session: _Session) -> SessionInfo:
        head = session.versions[session.head][0]
        counts = {"versions": len(session.versions), "snapshots": len(session.snapshots), "bytes": session.size}
        return SessionInfo(key, head, session.created, head.created, session.used, **counts)

    def _alive(self, tenant: str | None) -> Iterator[tuple[SessionKey, _Session]]:
        for key in sorted(self._kept):
            session = self._get(key)
            if session is not None and tenant in (None, key.tenant):
                yield key, session

    async def info(self, key: SessionKey) -> SessionInfo | None:
        """See StateStore."""
        session = self._get(key)
        return self._info(key, session) if session else None

    async def _sessions(self, tenant: str | None, after: SessionKey | None, limit: int) -> tuple[SessionInfo, ...]:
        alive = (self._info(key, session) for key, session in self._alive(tenant) if after is None or key > after)
        return tuple(itertools.islice(alive, limit))

    async def usage(self, tenant: str | None = None) -> Usage:
        """See StateStore."""
        return rules.total(self._info(key, session) for key, session in self._alive(tenant))

    async def delete(self, key: SessionKey) -> bool:
        """See StateStore."""
        existed = self._get(key) is not None
        self._kept.pop(key, None)
        self._leases.pop(key, None)
        self._turnstile.wake(key)
        return existed

    async def _erase(self, tenant: str) -> int:
        keys = {key for key in (*self._kept, *self._leases) if key.tenant == tenant}
        return sum([await self.delete(key) for key in keys])

    async def sweep(self) -> int:
        """See StateStore."""
        now = self._clock()
        for key in [key for key, lease in self._leases.items() if lease.expires <= now]:
            del self._leases[key]
        expired = [key for key in self._kept if self._get(key) is None]
        for key in expired:
            await self.delete(key)
        for session in self._kept.values():
            session.answers = {name: kept for name, kept in session.answers.items() if kept[1] > now}
        return len(expired)
