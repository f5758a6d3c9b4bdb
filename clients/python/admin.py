"""`Admin` and `AsyncAdmin`: all sessions of all tenants. They want the server's admin key, not a tenant's API key."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from .client import AsyncClient, Client, _json, _parse, _parse_list
from .drivers import Awaiting, Blocking, operation
from .flows import Call, Flow, request
from .types import SessionInfo

__all__ = ["Admin", "AsyncAdmin"]


class _AdminAPI:
    """The /admin routes. Counts and reports come as the server's plain JSON."""

    retries: int

    def _ask(self, method: str, *path: str, **params: Any) -> Flow[dict[str, Any]]:
        asked = {name: value for name, value in params.items() if value is not None}
        where = "/".join(["/admin", *(quote(part, safe="") for part in path)])
        answer = _json((yield from request(Call(method, where, params=asked), self.retries)))
        return answer if isinstance(answer, dict) else {"answer": answer}

    @operation
    def stats(self) -> Flow[dict[str, Any]]:
        """Engines, resident states and what the store holds."""
        return (yield from self._ask("GET", "stats"))

    @operation
    def sessions(self, tenant: str | None = None) -> Flow[list[SessionInfo]]:
        """The sessions of a tenant, or of all; each has a `tenant`."""
        found: list[SessionInfo] = []
        cursor: str | None = None
        while True:
            answer = yield from self._ask("GET", "sessions", tenant=tenant, cursor=cursor)
            found += _parse_list(SessionInfo, answer)
            cursor = answer.get("next")
            if cursor is None:
                return found

    @operation
    def show(self, tenant: str, session: str) -> Flow[SessionInfo]:
        """One session; `history` lists its kept versions."""
        return _parse(SessionInfo, (yield from self._ask("GET", "tenants", tenant, "sessions", session)))

    @operation
    def delete(self, tenant: str, session: str) -> Flow[int]:
        """Erase one session; 0 when there was none."""
        return int((yield from self._ask("DELETE", "tenants", tenant, "sessions", session))["deleted"])

    @operation
    def erase(self, tenant: str, prefix: str | None = None) -> Flow[int]:
        """Erase a tenant's sessions, or those whose id begins with `prefix`; how many there were."""
        return int((yield from self._ask("DELETE", "tenants", tenant, prefix=prefix))["deleted"])

    @operation
    def evict(self, tenant: str | None = None) -> Flow[int]:
        """Drop the resident copies of a tenant, or of all; how many."""
        return int((yield from self._ask("POST", "evict", tenant=tenant))["evicted"])

    @operation
    def flush(self) -> Flow[dict[str, Any]]:
        """Have everything written; says how durable it is."""
        return (yield from self._ask("POST", "flush"))

    @operation
    def drain(self, seconds: float | None = None) -> Flow[int]:
        """Take no more turns and wait for the running ones; how many still run."""
        return int((yield from self._ask("POST", "drain", seconds=seconds))["running"])

    @operation
    def fsck(self) -> Flow[list[str]]:
        """Check everything stored and every slot; one line per problem, empty = healthy."""
        return list((yield from self._ask("POST", "fsck"))["problems"])


class Admin(_AdminAPI, Blocking):
    """The admin API through a `Client` that was made with the admin key."""

    def __init__(self, client: Client) -> None:
        self._http, self.retries = client._http, client.retries


class AsyncAdmin(_AdminAPI, Awaiting):
    """As `Admin`, awaited."""

    def __init__(self, client: AsyncClient) -> None:
        self._http, self.retries = client._http, client.retries
