"""SqliteStore: one file, crash-safe, shared by processes of one machine.

WAL with synchronous=FULL: a commit is on disk when it returns. One thread writes, one reads, each with its own
connection; between processes BEGIN IMMEDIATE queues the writers.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

from nested_runtime.errors import ConfigError, StoreUnavailable
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
from nested_runtime.store.sqlite_file import connect, prepare, transaction, translated

__all__ = ["SqliteStore"]

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

_INFO = """
    SELECT s.tenant, s.session, h.record, s.created, s.updated, s.used,
        (SELECT count(*) FROM versions v WHERE v.sid = s.id),
        (SELECT count(*) FROM snapshots n WHERE n.sid = s.id),
        (SELECT sum(size) FROM versions v WHERE v.sid = s.id)
    FROM sessions s JOIN versions h ON h.sid = s.id AND h.number = s.head
    WHERE s.used > :cutoff
"""


@dataclass
class _Worker:
    """A thread and the connection only it uses."""

    path: Path
    timeout: float
    begin: str

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-store")
        self._connection: sqlite3.Connection | None = None

    async def run(self, work: Work[T], *, durable: bool = True) -> T:
        """`work` in one transaction on the thread; not `durable` = it may be lost with the machine, never torn."""
        try:
            future = asyncio.get_running_loop().run_in_executor(self._thread, self._run, work, durable)
        except RuntimeError as error:
            raise StoreUnavailable(f"session store {self.path} is closed") from error
        return await future

    def _run(self, work: Work[T], durable: bool) -> T:
        with translated(self.path):
            if self._connection is None:
                self._connection = connect(self.path, self.timeout)
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with transaction(self._connection, self.begin) as connection:
                return work(connection)

    async def truncate_log(self) -> None:
        """Move the log's pages into the file and empty it; left for later while a reader still needs it."""

        def work() -> None:
            with translated(self.path):
                if self._connection is not None:
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self) -> None:
        """Disconnect and end the thread, after what is queued."""

        def disconnect() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await asyncio.get_running_loop().run_in_executor(self._thread, disconnect)
        self._thread.shutdown()


class SqliteStore(StateStore):
    """The embedded store. `timeout` is how long a call waits for another process's write."""

    def __init__(self, path: Path, *, timeout: float = 10.0, **options: Any) -> None:
        super().__init__(**options)
        self.path = path
        self._timeout = timeout
        self._writer: _Worker | None = None
        self._reader: _Worker | None = None

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """`sqlite:///absolute/path` (percent-encoded where needed)."""
        parts = urlsplit(url)
        if parts.netloc or not parts.path.startswith("/") or parts.path.endswith("/") or parts.query:
            raise ConfigError(f"store URL {url!r} names no absolute path; write sqlite:///absolute/path/to/file.sqlite")
        return cls(Path(unquote(parts.path)), **options)

    async def open(self) -> None:
        """See StateStore. The file and its folder are created if absent, readable by the owner only."""
        await asyncio.to_thread(prepare, self.path, self._timeout)
        self._writer = _Worker(self.path, self._timeout, "BEGIN IMMEDIATE")
        self._reader = _Worker(self.path, self._timeout, "BEGIN")

    async def close(self) -> None:
        """See StateStore."""
        workers, self._reader, self._writer = (self._reader, self._writer), None, None
        for worker in workers:
            if worker is not None:
                await worker.close()

    @property
    def durability(self) -> str:
        """Always "fsynced"."""
        return "fsynced"

    async def ping(self) -> None:
        """See StateStore."""
        await self._read(lambda db: db.execute("SELECT count(*) FROM leases").fetchone())

    async def _read(self, work: Work[T]) -> T:
        if self._reader is None:
            raise StoreUnavailable(f"session store {self.path} is not open; call open() first")
        return await self._reader.run(work)

    async def _write(self, work: Work[T], *, durable: bool = True) -> T:
        if self._writer is None:
            raise StoreUnavailable(f"session store {self.path} is not open; call open() first")
        return await self._writer.run(work, durable=durable)

    def _cutoff(self) -> float:
        """Sessions last used at or before this time have expired."""
        return float("-inf") if self.ttl is None else self._clock() - self.ttl

    def _find(self, db: sqlite3.Connection, key: SessionKey) -> tuple[int, int] | None:
        """Row id and head of a session that has not expired."""
        found: tuple[int, int] | None = db.execute(
            "SELECT id, head FROM sessions WHERE tenant = ? AND session = ? AND used > ?",
            (key.tenant, key.session, self._cutoff()),
        ).fetchone()
        return found

    def _check_room(self, db: sqlite3.Connection, key: SessionKey) -> None:
        held = db.execute(
            "SELECT count(*) FROM sessions WHERE tenant = ? AND used > ?", (key.tenant, self._cutoff())
        ).fetchone()[0]
        if held >= self.limits.sessions_per_tenant:
            raise rules.too_many_sessions(key, self.limits)

    # ---- leases: not durable, because whoever holds one dies with the machine ---------------------------------------

    async def _try_lease(self, key: SessionKey, ttl: float) -> Lease | None:
        def work(db: sqlite3.Connection) -> Lease | None:
            now, name = self._clock(), (key.tenant, key.session)
            if db.execute(
                "SELECT 1 FROM leases WHERE tenant = ? AND session = ? AND expires > ?", (*name, now)
            ).fetchone():
                return None
            if self._find(db, key) is None:
                db.execute("DELETE FROM sessions WHERE tenant = ? AND session = ?", name)  # expired
                self._check_room(db, key)
            db.execute("UPDATE sessions SET used = ? WHERE tenant = ? AND session = ?", (now, *name))
            fence = db.execute(
                "INSERT OR REPLACE INTO leases (tenant, session, expires) VALUES (?, ?, ?)", (*name, now + ttl)
            ).lastrowid
            return Lease(key, fence or 0, ttl, now + ttl)

        return await self._write(work, durable=False)

    async def renew(self, lease: Lease) -> Lease:
        """See StateStore."""

        def work(db: sqlite3.Connection) -> Lease:
            now = self._clock()
            self._check_current(db, lease)
            db.execute("UPDATE leases SET expires = ? WHERE fence = ?", (now + lease.ttl, lease.fence))
            name = (lease.key.tenant, lease.key.session)
            db.execute("UPDATE sessions SET used = ? WHERE tenant = ? AND session = ?", (now, *name))
            return replace(lease, expires=now + lease.ttl)

        return await self._write(work, durable=False)

    def _check_current(self, db: sqlite3.Connection, lease: Lease) -> None:
        held = db.execute(
            "SELECT 1 FROM leases WHERE fence = ? AND tenant = ? AND session = ? AND expires > ?",
            (lease.fence, lease.key.tenant, lease.key.session, self._clock()),
        ).fetchone()
        if held is None:
            raise rules.lease_lost(lease)

    async def release(self, lease: Lease) -> None:
        """See StateStore."""
        await self._write(
            lambda db: db.execute("DELETE FROM leases WHERE fence = ?", (lease.fence,)).rowcount, durable=False
        )
        self._turnstile.wake(lease.key)

    # ---- versions ---------------------------------------------------------------------------------------------------

    async def head(self, key: SessionKey) -> Version | None:
        """See StateStore."""
        info = await self.info(key)
        return info.head if info else None

    async def versions(self, key: SessionKey) -> list[Version]:
        """See StateStore."""

        def work(db: sqlite3.Connection) -> list[Version]:
            sid, _ = self._find(db, key) or (0, 0)
            rows = db.execute("SELECT record FROM versions WHERE sid = ? ORDER BY number DESC", (sid,))
            return [Version.from_json(record) for (record,) in rows]

        return await self._read(work)

    async def _load(self, key: SessionKey, number: int | None, snapshot: str | None) -> tuple[Version, bytes] | None:
        def work(db: sqlite3.Connection) -> tuple[str, bytes] | None:
            sid, head = self._find(db, key) or (0, 0)
            wanted: int | None = head if number is None else number
            if snapshot is not None:
                row = db.execute("SELECT number FROM snapshots WHERE sid = ? AND id = ?", (sid, snapshot)).fetchone()
                wanted = row[0] if row else None
            found: tuple[str, bytes] | None = db.execute(
                "SELECT record, state FROM versions WHERE sid = ? AND number = ?", (sid, wanted)
            ).fetchone()
            return found

        found = await self._read(work)
        return (Version.from_json(found[0]), found[1]) if found else None

    async def _commit(self, lease: Lease, version: Version, packed: bytes, answer: StoredAnswer | None) -> None:
        await self._write(lambda db: self._commit_in(db, lease, version, packed, answer))

    def _commit_in(
        self, db: sqlite3.Connection, lease: Lease, version: Version, packed: bytes, answer: StoredAnswer | None
    ) -> None:
        now, key = self._clock(), lease.key
        self._check_current(db, lease)
        sid, head = self._find(db, key) or (0, 0)
        if head != (version.parent or 0):
            raise rules.version_conflict(key, version.parent or 0, head)
        if not sid:
            self._check_room(db, key)
            sid = (
                db.execute(
                    "INSERT INTO sessions (tenant, session, head, created, updated, used) VALUES (?, ?, 0, ?, ?, ?)",
                    (key.tenant, key.session, now, now, now),
                ).lastrowid
                or 0
            )
        if answer is not None:
            self._remember(db, sid, key, replace(answer, version=version.number), now)
        self._prune(db, sid, version.number)  # before the insert, which then reuses the pages
        held = db.execute("SELECT total(size) FROM versions WHERE sid = ?", (sid,)).fetchone()[0]
        if held + version.size > self.limits.bytes_per_session:
            raise rules.too_large(key, int(held) + version.size, self.limits)
        db.execute(
            "INSERT INTO versions (sid, number, size, record, state) VALUES (?, ?, ?, ?, ?)",
            (sid, version.number, version.size, version.to_json(), packed),
        )
        db.execute("UPDATE sessions SET head = ?, updated = ?, used = ? WHERE id = ?", (version.number, now, now, sid))

    def _prune(self, db: sqlite3.Connection, sid: int, head: int) -> None:
        numbers = [number for (number,) in db.execute("SELECT number FROM versions WHERE sid = ?", (sid,))]
        pinned = {number for (number,) in db.execute("SELECT number FROM snapshots WHERE sid = ?", (sid,))}
        for number in rules.prunable(numbers, pinned, head, self.limits.retain):
            db.execute("DELETE FROM versions WHERE sid = ? AND number = ?", (sid, number))

    def _remember(self, db: sqlite3.Connection, sid: int, key: SessionKey, answer: StoredAnswer, now: float) -> None:
        db.execute("DELETE FROM answers WHERE sid = ? AND expires <= ?", (sid, now))
        if db.execute("SELECT 1 FROM answers WHERE sid = ? AND name = ?", (sid, answer.key)).fetchone():
            raise rules.answered(key, answer)
        db.execute(
            "DELETE FROM answers WHERE sid = ?1 AND id NOT IN "
            "(SELECT id FROM answers WHERE sid = ?1 ORDER BY id DESC LIMIT ?2)",
            (sid, self.limits.answers_per_session - 1),
        )
        db.execute(
            "INSERT INTO answers (sid, name, body_digest, number, expires, answer) VALUES (?, ?, ?, ?, ?, ?)",
            (sid, answer.key, answer.body_digest, answer.version, now + self.answer_ttl, answer.answer),
        )

    async def _answer(self, key: SessionKey, answer_key: str) -> StoredAnswer | None:
        def work(db: sqlite3.Connection) -> StoredAnswer | None:
            sid, _ = self._find(db, key) or (0, 0)
            row = db.execute(
                "SELECT name, body_digest, answer, number FROM answers WHERE sid = ? AND name = ? AND expires > ?",
                (sid, answer_key, self._clock()),
            ).fetchone()
            return StoredAnswer(*row) if row else None

        return await self._read(work)

    # ---- snapshots --------------------------------------------------------------------------------------------------

    async def _snapshot(self, key: SessionKey, number: int | None, label: str) -> Snapshot:
        def work(db: sqlite3.Connection) -> Snapshot:
            sid, head = self._find(db, key) or (0, 0)
            made = rules.new_snapshot(head if number is None else number, label, self._clock())
            if not db.execute("SELECT 1 FROM versions WHERE sid = ? AND number = ?", (sid, made.version)).fetchone():
                raise rules.no_version(key, number)
            held = db.execute("SELECT count(*) FROM snapshots WHERE sid = ?", (sid,)).fetchone()[0]
            if held >= self.limits.snapshots_per_session:
                raise rules.too_many_snapshots(key, self.limits)
            row = (sid, made.id, made.version, made.label, made.created)
            db.execute("INSERT INTO snapshots (sid, id, number, label, created) VALUES (?, ?, ?, ?, ?)", row)
            return made

        return await self._write(work)

    async def snapshots(self, key: SessionKey) -> list[Snapshot]:
        """See StateStore."""

        def work(db: sqlite3.Connection) -> list[Snapshot]:
            sid, _ = self._find(db, key) or (0, 0)
            rows = db.execute(
                "SELECT id, number, label, created FROM snapshots WHERE sid = ? ORDER BY created, id", (sid,)
            )
            return [Snapshot(*row) for row in rows]

        return await self._read(work)

    async def _delete_snapshot(self, key: SessionKey, snapshot: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            sid, head = self._find(db, key) or (0, 0)
            deleted = db.execute("DELETE FROM snapshots WHERE sid = ? AND id = ?", (sid, snapshot)).rowcount
            self._prune(db, sid, head)
            return bool(deleted)

        return await self._write(work)

    # ---- sessions ---------------------------------------------------------------------------------------------------

    async def _infos(self, where: str, **values: object) -> tuple[SessionInfo, ...]:
        def work(db: sqlite3.Connection) -> tuple[SessionInfo, ...]:
            rows = db.execute(f"{_INFO} {where}", {"cutoff": self._cutoff(), **values})
            return tuple(SessionInfo(SessionKey(*row[:2]), Version.from_json(row[2]), *row[3:]) for row in rows)

        return await self._read(work)

    async def info(self, key: SessionKey) -> SessionInfo | None:
        """See StateStore."""
        where = "AND s.tenant = :tenant AND s.session = :session"
        found = await self._infos(where, tenant=key.tenant, session=key.session)
        return found[0] if found else None

    async def _sessions(self, tenant: str | None, after: SessionKey | None, limit: int) -> tuple[SessionInfo, ...]:
        where = (
            "AND (:tenant IS NULL OR s.tenant = :tenant) AND (s.tenant, s.session) > (:after, :after_session) "
            "ORDER BY s.tenant, s.session LIMIT :limit"
        )
        start = {"after": after.tenant if after else "", "after_session": after.session if after else ""}
        return await self._infos(where, tenant=tenant, limit=limit, **start)

    async def usage(self, tenant: str | None = None) -> Usage:
        """See StateStore."""
        return rules.total(await self._infos("AND (:tenant IS NULL OR s.tenant = :tenant)", tenant=tenant))

    async def delete(self, key: SessionKey) -> bool:
        """See StateStore."""
        return await self._delete(key.tenant, key.session) > 0

    async def _erase(self, tenant: str) -> int:
        return await self._delete(tenant)

    async def _delete(self, tenant: str, session: str | None = None) -> int:
        def work(db: sqlite3.Connection) -> tuple[int, set[str]]:
            if session is not None:
                names = {session}
            else:
                query = (
                    "SELECT session FROM sessions WHERE tenant = ?1 UNION SELECT session FROM leases WHERE tenant = ?1"
                )
                names = {name for (name,) in db.execute(query, (tenant,))}
            alive = [name for name in names if self._find(db, SessionKey(tenant, name))]
            for name in names:
                db.execute("DELETE FROM leases WHERE tenant = ? AND session = ?", (tenant, name))
                db.execute("DELETE FROM sessions WHERE tenant = ? AND session = ?", (tenant, name))
            return len(alive), names

        gone, names = await self._write(work)
        for name in names:
            self._turnstile.wake(SessionKey(tenant, name))
        if self._writer is not None:
            await self._writer.truncate_log()  # the log would otherwise keep the erased bytes for a while
        return gone

    async def sweep(self) -> int:
        """See StateStore."""

        def work(db: sqlite3.Connection) -> int:
            now = self._clock()
            db.execute("DELETE FROM leases WHERE expires <= ?", (now,))
            db.execute("DELETE FROM answers WHERE expires <= ?", (now,))
            return db.execute("DELETE FROM sessions WHERE used <= ?", (self._cutoff(),)).rowcount

        return await self._write(work)

    async def _fsck(self) -> list[str]:
        def work(db: sqlite3.Connection) -> list[str]:
            problems = [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            problems += [
                f"row {row[1]} of {row[0]} belongs to no session" for row in db.execute("PRAGMA foreign_key_check")
            ]
            heads = db.execute(
                "SELECT tenant, session, head FROM sessions s WHERE head IS NOT "
                "(SELECT max(number) FROM versions v WHERE v.sid = s.id)"
            )
            return problems + [
                f"{tenant!r}/{session!r}: head {head} is not its newest version" for tenant, session, head in heads
            ]

        return await self._read(work)
