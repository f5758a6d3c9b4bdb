"""Around every request: id, key, body limit, log line. Plain ASGI, so streams pass through untouched."""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import DEFAULT_TENANT, Keys, bearer
from .errors import error_response
from .logs import FIELDS
from .tracing import NoTracing

__all__ = ["OPEN", "Gate"]

logger = logging.getLogger("nested.access")
OPEN = frozenset({"/health", "/ready"})
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """Gives every request an id, lets it in or not, bounds its body, and logs one line about it.

    open_paths  exact paths that ask for no key and are nobody's request
    observe     told route path, status
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        admin_keys: Keys,
        open_paths: frozenset[str],
        max_body_bytes: int,
        max_in_flight: int,
        log_ids: bool,
        observe: Callable[[str, int], None],
        tracing: NoTracing,
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._open_paths = open_paths
        self._max_body_bytes = max_body_bytes
        self._max_in_flight = max_in_flight
        self._in_flight: Counter[str] = Counter()
        self._log_ids = log_ids
        self._observe = observe
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope["path"] = _kept_slashes(scope)
        request_id = _request_id(headers.get(b"x-request-id", b"").decode("latin-1"))
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, tenant=DEFAULT_TENANT)
        began, status = time.perf_counter(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        with self._tracing.request(sent) as note:
            try:
                refusal = self._refusal(scope, headers)
                if refusal is None:
                    with self._counted(scope):
                        await self._app(scope, self._bounded(receive), send_with_id)
                else:
                    await error_response(refusal)(scope, receive, send_with_id)
            finally:
                said = self._said(scope, status, time.perf_counter() - began)
                note(said)
                self._log(said)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> HTTPException | None:
        path = _path(scope)
        if int(_digits(headers.get(b"content-length", b"0"))) > self._max_body_bytes:
            return self._too_large()
        if path in self._open_paths:
            return None
        key = bearer(headers)
        is_admin = _is_admin(path)
        if is_admin and self._admin_keys:
            return None if self._admin_keys.tenant(key) else _unauthorized("the admin key")
        tenant = self._keys.tenant(key) if self._keys else DEFAULT_TENANT
        if tenant is None:
            return _unauthorized("an API key")
        if is_admin:
            return HTTPException(404, "the admin API is off; start the server with --admin-key-file")
        scope["state"]["tenant"] = tenant
        if self._in_flight[tenant] >= self._max_in_flight:
            return HTTPException(
                429,
                f"{self._max_in_flight} requests of yours are running already; retry when some are answered",
                {"Retry-After": "1"},
            )
        return None

    @contextmanager
    def _counted(self, scope: Scope) -> Iterator[None]:
        """Count a tenant's request while it runs; health checks and the admin are nobody's."""
        path, tenant = _path(scope), scope["state"]["tenant"]
        if path in self._open_paths or _is_admin(path):
            yield
            return
        self._in_flight[tenant] += 1
        try:
            yield
        finally:
            self._in_flight[tenant] -= 1
            if not self._in_flight[tenant]:
                del self._in_flight[tenant]

    def _bounded(self, receive: Receive) -> Receive:
        left = self._max_body_bytes

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413,
            f"the request body is over the limit of {self._max_body_bytes} bytes; send less, or raise --max-body-bytes",
        )

    def _said(self, scope: Scope, status: int, seconds: float) -> dict[str, Any]:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "(none)")
        self._observe(route, status)
        return {
            "method": scope["method"],
            "route": route,
            "status": status,
            "milliseconds": round(seconds * 1000),
            "request": state["request_id"],
            "tenant": self._shown(state["tenant"]),
            "session": self._shown(state.get("session", "")),
        }

    def _log(self, said: dict[str, Any]) -> None:
        text = "%(method)s %(route)s %(status)d %(milliseconds)dms request=%(request)s tenant=%(tenant)r "
        logger.info(text + "session=%(session)r", said, extra={FIELDS: said})

    def _shown(self, name: str) -> str:
        if self._log_ids or not name:
            return name
        return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _kept_slashes(scope: Scope) -> str:
    """The decoded path, except that %2F stays: a session id or tenant may hold a slash (the routes decode it)."""
    raw: bytes = scope.get("raw_path") or b""
    if b"%" not in raw or (b"/sessions/" not in raw and b"/tenants/" not in raw):
        return str(scope["path"])
    text = raw.decode("latin-1").replace("%25", "%2525").replace("%2F", "%252F").replace("%2f", "%252F")
    return unquote(text)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


def _digits(value: bytes) -> bytes:
    return value if value.isdigit() and len(value) < 19 else b"0"


def _request_id(sent: str) -> str:
    return sent if REQUEST_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}"


def _unauthorized(what: str) -> HTTPException:
    return HTTPException(
        401, f"{what} is missing or wrong; send `Authorization: Bearer <key>`", {"WWW-Authenticate": "Bearer"}
    )
