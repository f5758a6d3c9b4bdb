"""StateStore: versions of sessions as bytes, exclusive leases with fencing, one atomic compare-and-set commit.

A session is a branch and its head the newest version. Whoever wants to commit holds the session's lease; `commit`
checks in one atomic step that the lease is still the current one and that nobody committed since. A session comes
into being with its first commit (parent 0) and ends with `delete`, `erase` or idleness (`ttl`); after that its id
starts afresh at version 1, while fences keep growing. Errors: NotFound, SessionBusy, LeaseLost, VersionConflict,
Conflict, RequestError and Overloaded as documented per method; StoreUnavailable whenever the store cannot answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any, Self

from nested_runtime.errors import (
    ConfigError,
    LeaseLost,
    NotFound,
    RequestError,
    SessionBusy,
    StoreError,
    StoreUnavailable,
)
from nested_runtime.store import blob as envelope
from nested_runtime.store import rules
from nested_runtime.store.records import (
    Draft,
    Lease,
    Limits,
    Page,
    SessionInfo,
    SessionKey,
    Snapshot,
    StoredAnswer,
    Usage,
    Version,
    check_text,
)
from nested_runtime.store.turnstile import Turnstile, shielded

__all__ = [
    "Draft",
    "Lease",
    "Limits",
    "Page",
    "SessionInfo",
    "SessionKey",
    "Snapshot",
    "StateStore",
    "StoredAnswer",
    "Usage",
    "Version",
]

MAX_RECORD = 64 << 10
MAX_PAGE = 1_000


class StateStore(ABC):
    """The contract. Methods may be called concurrently from one event loop; a cancelled call never half-happens.

    limits      bounds, enforced in the same atomic step as the write
    ttl         seconds after which an idle session (no lease, no commit) expires; None = never
    answer_ttl  seconds an idempotency record is kept
    clock       seconds since the epoch; None = the real time (for Redis the server's)
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        ttl: float | None = None,
        answer_ttl: float = 86_400.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        for name, value in (("ttl", ttl), ("answer_ttl", answer_ttl)):
            if value is not None and not value > 0:
                raise ConfigError(f"store option {name} is {value!r}; give seconds over 0")
        self.limits = limits or Limits()
        self.ttl = ttl
        self.answer_ttl = answer_ttl
        self._clock = clock or time.time
        self._turnstile = Turnstile()

    @classmethod
    @abstractmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """The store a URL names, not opened yet; ConfigError if the URL is impossible. See `open_store`."""

    # ---- life -------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def open(self) -> None:
        """Connect, check that the file or database is ours (StoreFormatError), create or migrate the schema."""

    @abstractmethod
    async def close(self) -> None:
        """Finish running calls and disconnect. Safe to call twice."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    @abstractmethod
    def durability(self) -> str:
        """What a returned commit survives, as really in force.

        "memory": the process that holds the store (a crash of the machine may lose the last second); "acked": also the
        loss of that machine (a replica has it); "fsynced": also power loss (it is on disk).
        """

    @abstractmethod
    async def ping(self) -> None:
        """Return if the store answers, raise StoreUnavailable if not."""

    async def fsck(self) -> list[str]:
        """Check everything stored, checksums included; one line per problem, empty = healthy."""
        from nested_runtime.store.fsck import check_session

        problems, cursor = await self._fsck(), None
        try:
            while True:
                page = await self.sessions(cursor=cursor)
                for info in page.sessions:
                    problems += await check_session(self, info.key)
                if page.cursor is None:
                    return problems
                cursor = page.cursor
        except StoreUnavailable:
            raise
        except StoreError as error:
            return [*problems, f"the check stopped early: {error}"]

    async def _fsck(self) -> list[str]:
        """Checks of this kind of store, beside those of each session."""
        return []

    # ---- leases -----------------------------------------------------------------------------------------------------

    async def lease(self, key: SessionKey, *, ttl: float = 30.0, wait: float = 0.0) -> Lease:
        """Take the session exclusively for `ttl` seconds, queueing up to `wait` seconds: SessionBusy after that.

        A session need not exist to be leased; Overloaded when it does not and the tenant holds its maximum.
        """
        if not ttl > 0:
            raise RequestError(f"lease ttl is {ttl!r}; give seconds over 0", param="ttl")
        if self.ttl is not None and ttl > self.ttl:
            raise ConfigError(f"lease ttl {ttl:g} is over the sessions' ttl {self.ttl:g}; a running turn could expire")
        loop = asyncio.get_running_loop()
        deadline, delay = loop.time() + max(wait, 0.0), 0.005
        try:
            async with self._turnstile.enter(key, max(wait, 0.0)) as freed:
                while True:
                    freed.clear()
                    lease = await shielded(self._try_lease(key, ttl), undo=self._release_if_taken)
                    if lease is not None:
                        return lease
                    left = deadline - loop.time()
                    if left <= 0:
                        raise TimeoutError
                    with suppress(TimeoutError):
                        await asyncio.wait_for(freed.wait(), min(delay, left))
                    delay = min(delay * 1.5, 0.1)
        except TimeoutError:
            raise SessionBusy(
                f"session {key.session!r} is held by another turn and was not free within {wait:g} s; retry later"
            ) from None

    async def _release_if_taken(self, lease: Lease | None) -> None:
        if lease is not None:
            await self.release(lease)

    @asynccontextmanager
    async def hold(self, key: SessionKey, *, ttl: float = 30.0, wait: float = 0.0) -> AsyncIterator[Lease]:
        """`lease` for the length of a `with` block, renewed in the background and released at its end."""
        lease = await self.lease(key, ttl=ttl, wait=wait)
        renewing = asyncio.create_task(self._keep(lease))
        try:
            yield lease
        finally:
            renewing.cancel()
            with suppress(StoreUnavailable):  # it expires by itself, and what the block did must not be hidden
                await shielded(self.release(lease))

    async def _keep(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(lease.ttl / 3)
            try:
                await self.renew(lease)
            except LeaseLost:
                return  # commit will say so
            except StoreError:
                continue  # it may be back in time

    @abstractmethod
    async def _try_lease(self, key: SessionKey, ttl: float) -> Lease | None:
        """One attempt: the lease, or None while another holder's is current. Expires the session first if idle."""

    @abstractmethod
    async def renew(self, lease: Lease) -> Lease:
        """Extend by the lease's ttl from now; the fence stays. LeaseLost if it expired, was taken or deleted."""

    @abstractmethod
    async def release(self, lease: Lease) -> None:
        """Give the session back. A lease that is no longer current is ignored."""

    # ---- versions ---------------------------------------------------------------------------------------------------

    @abstractmethod
    async def head(self, key: SessionKey) -> Version | None:
        """The newest version, or None when the session does not exist."""

    @abstractmethod
    async def versions(self, key: SessionKey) -> list[Version]:
        """The kept versions, newest first; empty when the session does not exist."""

    async def load(
        self, key: SessionKey, number: int | None = None, *, snapshot: str | None = None
    ) -> tuple[Version, bytes]:
        """The head, version `number`, or the version of a snapshot, with its state.

        NotFound if there is none or it is no longer kept; StateError if the bytes are damaged.
        """
        if snapshot is not None:
            check_text(snapshot, "snapshot")
            number = None  # the snapshot says it
        found = None if _impossible(number) else await self._load(key, number, snapshot)
        if found is None:
            wanted = f"snapshot {snapshot!r}" if snapshot is not None else f"version {number or 'head'}"
            raise NotFound(f"session {key.session!r} has no {wanted} (deleted, or no longer kept); list what it has")
        version, packed = found
        return version, await self._unpack(key, version.number, packed)

    async def _unpack(self, key: SessionKey, number: int, packed: bytes) -> bytes:
        context = _context(key, number)
        return await asyncio.to_thread(envelope.unpack, packed, context, max_bytes=self.limits.state_bytes)

    @abstractmethod
    async def _load(self, key: SessionKey, number: int | None, snapshot: str | None) -> tuple[Version, bytes] | None:
        """The version and its packed bytes, read together."""

    async def commit(
        self, lease: Lease, parent: int, state: bytes, draft: Draft, answer: StoredAnswer | None = None
    ) -> Version:
        """Make `state` version `parent` + 1 and keep `answer` with it, or change nothing. 0 is the parent of the first.

        LeaseLost if the lease is not current; VersionConflict if the head is not `parent`; Conflict if the answer's
        key is already answered; Overloaded at sessions_per_tenant; RequestError over the byte limits.
        On StoreUnavailable the commit may or may not have happened: read `head` to know.
        """
        if len(state) > self.limits.state_bytes:
            raise RequestError(f"state has {len(state)} bytes, over the limit state_bytes={self.limits.state_bytes}")
        if answer is not None and len(answer.answer) > self.limits.answer_bytes:
            raise RequestError(
                f"the answer has {len(answer.answer)} bytes, over the limit answer_bytes={self.limits.answer_bytes} of "
                "what is kept for an Idempotency-Key; ask for less, or without a key",
                param="Idempotency-Key",
            )
        number = parent + 1
        packed = await asyncio.to_thread(envelope.pack, state, _context(lease.key, number))
        fields = {**asdict(draft), "number": number, "parent": parent or None, "size": len(packed)}
        version = Version(**fields, created=self._clock())
        try:
            record = version.to_json()
        except (TypeError, ValueError) as error:
            raise RequestError(f"draft cannot be written as JSON: {error}; give finite numbers and strings") from error
        if len(record) > MAX_RECORD:
            raise RequestError(
                f"draft has {len(record)} bytes as JSON, over {MAX_RECORD}; keep extra small", param="extra"
            )
        version = Version.from_json(record)  # as every later reader sees it
        await shielded(self._commit(lease, version, packed, answer))
        return version

    @abstractmethod
    async def _commit(self, lease: Lease, version: Version, packed: bytes, answer: StoredAnswer | None) -> None:
        """The atomic step of `commit`."""

    async def answer(self, key: SessionKey, answer_key: str) -> StoredAnswer | None:
        """The idempotency record of the request with this key, if it was committed within `answer_ttl`."""
        check_text(answer_key, "Idempotency-Key")
        return await self._answer(key, answer_key)

    @abstractmethod
    async def _answer(self, key: SessionKey, answer_key: str) -> StoredAnswer | None: ...

    # ---- snapshots --------------------------------------------------------------------------------------------------

    async def snapshot(self, key: SessionKey, number: int | None = None, label: str = "") -> Snapshot:
        """Keep a version (the head when None) beyond `retain`. NotFound; RequestError at snapshots_per_session."""
        if label:
            check_text(label, "label")
        if _impossible(number):
            raise rules.no_version(key, number)
        return await self._snapshot(key, number, label)

    @abstractmethod
    async def _snapshot(self, key: SessionKey, number: int | None, label: str) -> Snapshot: ...

    @abstractmethod
    async def snapshots(self, key: SessionKey) -> list[Snapshot]:
        """Oldest first; empty when the session does not exist."""

    async def delete_snapshot(self, key: SessionKey, snapshot: str) -> bool:
        """Forget a snapshot, and its version if nothing else keeps it. False if there was none."""
        check_text(snapshot, "snapshot")
        return await self._delete_snapshot(key, snapshot)

    @abstractmethod
    async def _delete_snapshot(self, key: SessionKey, snapshot: str) -> bool: ...

    # ---- sessions ---------------------------------------------------------------------------------------------------

    @abstractmethod
    async def info(self, key: SessionKey) -> SessionInfo | None:
        """The session from outside, or None when it does not exist."""

    async def sessions(self, tenant: str | None = None, *, cursor: str | None = None, limit: int = 100) -> Page:
        """A page of the tenant's (None: everybody's) sessions in key order, continued at a page's `cursor`."""
        if tenant is not None:
            check_text(tenant, "tenant")
        if not 1 <= limit <= MAX_PAGE:
            raise RequestError(f"limit is {limit}; give 1 to {MAX_PAGE}", param="limit")
        found = await self._sessions(tenant, rules.key_of(cursor) if cursor is not None else None, limit + 1)
        return Page(found[:limit], rules.cursor_of(found[limit - 1].key) if len(found) > limit else None)

    @abstractmethod
    async def _sessions(self, tenant: str | None, after: SessionKey | None, limit: int) -> tuple[SessionInfo, ...]: ...

    @abstractmethod
    async def usage(self, tenant: str | None = None) -> Usage:
        """Totals of a tenant, or of everybody."""

    @abstractmethod
    async def delete(self, key: SessionKey) -> bool:
        """Erase versions, snapshots, answers and lease (its holder is fenced). False if the session did not exist."""

    async def erase(self, tenant: str) -> int:
        """`delete` every session of a tenant, running ones included; how many existed."""
        check_text(tenant, "tenant")
        return await self._erase(tenant)

    @abstractmethod
    async def _erase(self, tenant: str) -> int: ...

    @abstractmethod
    async def sweep(self) -> int:
        """Erase expired sessions and answers; how many sessions. Call it now and then."""


def _impossible(number: int | None) -> bool:
    return number is not None and not 1 <= number < 1 << 53


def _context(key: SessionKey, number: int) -> bytes:
    return json.dumps([key.tenant, key.session, number]).encode()
