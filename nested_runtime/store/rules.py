"""Rules that all stores share: what is pruned, how pages continue, and how refusals are worded."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Collection, Iterable

from nested_runtime.errors import Conflict, LeaseLost, NotFound, Overloaded, RequestError, VersionConflict
from nested_runtime.store.records import Lease, Limits, SessionInfo, SessionKey, Snapshot, StoredAnswer, Usage

__all__ = [
    "answered",
    "cursor_of",
    "key_of",
    "lease_lost",
    "new_snapshot",
    "no_version",
    "prunable",
    "too_large",
    "too_many_sessions",
    "too_many_snapshots",
    "total",
    "version_conflict",
]


def prunable(numbers: Iterable[int], pinned: Collection[int], head: int, retain: int) -> list[int]:
    """The versions that neither `retain` nor a snapshot keeps once `head` is the head."""
    return [number for number in numbers if number <= head - retain and number not in pinned]


def cursor_of(key: SessionKey) -> str:
    """The opaque cursor that continues after `key`."""
    return base64.urlsafe_b64encode(json.dumps([key.tenant, key.session]).encode()).decode()


def key_of(cursor: str) -> SessionKey:
    """Inverse of `cursor_of`; RequestError if it is not one."""
    try:
        tenant, session = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return SessionKey(tenant, session)
    except (ValueError, TypeError, RequestError):
        raise RequestError(f"cursor {cursor[:80]!r} is not one of ours; use a page's cursor", param="cursor") from None


def new_snapshot(version: int, label: str, created: float) -> Snapshot:
    """A snapshot with a fresh, unguessable id."""
    return Snapshot(id=f"snap_{secrets.token_hex(8)}", version=version, label=label, created=created)


def total(infos: Iterable[SessionInfo]) -> Usage:
    """The sum over sessions."""
    sums = [0, 0, 0, 0]
    for info in infos:
        sums = [a + b for a, b in zip(sums, (1, info.versions, info.snapshots, info.bytes), strict=True)]
    return Usage(*sums)


def lease_lost(lease: Lease) -> LeaseLost:
    """The lease is not current."""
    return LeaseLost(
        f"lease {lease.fence} on session {lease.key.session!r} expired, was taken over, or the session was deleted; "
        "nothing was written: send the request again"
    )


def version_conflict(key: SessionKey, parent: int, head: int) -> VersionConflict:
    """Somebody committed in between."""
    return VersionConflict(
        f"session {key.session!r} is at version {head}, not {parent}; nothing was written: read it again and retry"
    )


def answered(key: SessionKey, answer: StoredAnswer) -> Conflict:
    """The idempotency key already has an answer."""
    return Conflict(
        f"Idempotency-Key {answer.key!r} is already answered in session {key.session!r}; nothing was written: "
        "replay the stored answer or use another key"
    )


def no_version(key: SessionKey, number: int | None) -> NotFound:
    """There is no such version to snapshot."""
    return NotFound(
        f"session {key.session!r} has no version {number or 'at all'} (deleted, or no longer kept); list its versions"
    )


def too_many_sessions(key: SessionKey, limits: Limits) -> Overloaded:
    """The tenant is full."""
    return Overloaded(
        f"tenant {key.tenant!r} has its maximum of {limits.sessions_per_tenant} sessions; delete some or raise "
        "sessions_per_tenant",
        retry_after=60.0,
    )


def too_large(key: SessionKey, size: int, limits: Limits) -> RequestError:
    """The session's versions are too large together."""
    return RequestError(
        f"session {key.session!r} would hold {size} bytes, over bytes_per_session={limits.bytes_per_session}; "
        "delete snapshots or raise the limit",
        code="session_too_large",
    )


def too_many_snapshots(key: SessionKey, limits: Limits) -> RequestError:
    """The session has its maximum of snapshots."""
    return RequestError(
        f"session {key.session!r} has its maximum of {limits.snapshots_per_session} snapshots; delete one first",
        code="too_many_snapshots",
    )
