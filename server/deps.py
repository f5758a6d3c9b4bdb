"""What a request handler needs: the service, and who is calling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Header, Request

from nested_runtime.errors import NotFound, Overloaded, RequestError
from nested_runtime.sessions import Consolidator, Runtime, ServedModel, SessionManager, Vault
from nested_runtime.store.base import SessionKey, StateStore

from .answers import AnswerCache
from .auth import Keys
from .metrics import Metrics
from .settings import Settings
from .tracing import NoTracing

__all__ = [
    "Caller",
    "CallerDep",
    "Expected",
    "Named",
    "Service",
    "ServiceDep",
    "caller_of",
    "expected_version",
    "named_session",
    "session_key",
]


@dataclass
class Service:
    """Everything a running server holds. Made once per app, never global."""

    settings: Settings
    store: StateStore
    vault: Vault
    runtime: Runtime
    manager: SessionManager
    consolidator: Consolidator
    metrics: Metrics
    answers: AnswerCache
    keys: Keys
    admin_keys: Keys
    tracing: NoTracing
    started: int = 0  # seconds since the epoch
    ready: bool = False
    leaving: bool = False  # still serving, but /ready says no

    def admit(self) -> None:
        """Refuse new turns while the server shuts down."""
        if not self.ready:
            refusal = Overloaded("the server is shutting down; retry later, perhaps elsewhere", retry_after=5.0)
            refusal.code = "shutting_down"
            raise refusal

    @property
    def shown_store(self) -> str:
        """The store's URL without a password."""
        return re.sub(r"//[^@/]*@", "//***@", self.settings.store_url)

    def model(self, name: str) -> ServedModel:
        """The served model; 404 with OpenAI's code otherwise."""
        try:
            return self.runtime.model(name)
        except NotFound as error:
            error.code = "model_not_found"
            raise


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    tenant: str
    request_id: str


def service_of(request: Request) -> Service:
    """The app's service."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    """Tenant and request id, as the middleware found them."""
    return Caller(request.scope["state"]["tenant"], request.scope["state"]["request_id"])


ServiceDep = Annotated[Service, Depends(service_of)]
CallerDep = Annotated[Caller, Depends(caller_of)]


def session_key(request: Request, in_body: str | None) -> SessionKey | None:
    """The session a request names: header X-Session-ID or body session_id. None = memoryless."""
    in_header = request.headers.get("x-session-id")
    if in_header is not None:
        in_header = _utf8(in_header)
    if in_header is not None and in_body is not None and in_header != in_body:
        raise RequestError(
            f"X-Session-ID is {in_header[:80]!r} but session_id is {in_body[:80]!r}; send one of them",
            param="session_id",
        )
    name = in_header if in_header is not None else in_body
    return None if name is None else named_session(request, name)


def session_of_path(request: Request, id: str) -> SessionKey:
    """The session of a path, where the middleware left %2F and %25 as they were."""
    return named_session(request, unquote(id))


def named_session(request: Request, id: str) -> SessionKey:
    """The session of that id of the calling tenant, noted for the log."""
    request.scope["state"]["session"] = id
    return SessionKey(caller_of(request).tenant, id)


def expected_version(if_match: Annotated[str | None, Header()] = None) -> int | None:
    """If-Match: the version the caller believes is the newest. Absent or * = any."""
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise RequestError(f"If-Match is {if_match[:80]!r}; send a version number, such as 3", param="If-Match")
    return int(text)


Named = Annotated[SessionKey, Depends(session_of_path)]
Expected = Annotated[int | None, Depends(expected_version)]


def _utf8(value: str) -> str:
    """A header value that was sent as UTF-8; others stay as they are."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value
