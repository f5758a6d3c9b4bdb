"""The errors of the SDK.

ClientError
|-- ConfigError             an argument or environment value of the client is impossible
|-- ConnectionFailed        no answer: refused, cut or timed out
|-- ProtocolError           an answer that the API does not define; is this a Nested Runtime server?
`-- APIError                the server said no: `status`, `code`, `param`, `request_id`
    |-- BadRequest          400, 413, 422: the request is wrong; `param` names the field
    |-- NotAuthorized       401, 403: the key is missing, wrong or not allowed to do this
    |-- NotFound            404: no such session, version, snapshot or model for this key
    |-- Conflict            409, 412: the session is busy or has moved on
    |-- RateLimited         429: a limit is reached; `retry_after` in seconds
    `-- ServerError         5xx: the server or its store failed; `retry_after` when it said so
"""

from __future__ import annotations

from typing import Any

import httpx

__all__ = [
    "APIError",
    "BadRequest",
    "ClientError",
    "ConfigError",
    "Conflict",
    "ConnectionFailed",
    "NotAuthorized",
    "NotFound",
    "ProtocolError",
    "RateLimited",
    "ServerError",
    "api_error",
    "stream_error",
]


class ClientError(Exception):
    """Base of all errors the SDK raises on purpose."""


class ConfigError(ClientError, ValueError):
    """An argument or environment value of the client is impossible."""


class ConnectionFailed(ClientError):
    """No answer. `sent` says whether the server may have read the request."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class ProtocolError(ClientError):
    """An answer that the API does not define."""


class APIError(ClientError):
    """The server refused. `code` is stable and machine-readable, `param` the field it is about."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequest(APIError):
    """The request is wrong; sending it again will not help."""


class NotAuthorized(APIError):
    """The API key is missing, unknown or not allowed to do this."""


class NotFound(APIError):
    """No such session, version, snapshot or model for this key."""


class Conflict(APIError):
    """The session is busy or has moved on; `code` says which."""


class RateLimited(APIError):
    """A limit is reached; try again after `retry_after` seconds."""


class ServerError(APIError):
    """The server or its store failed."""


_BY_STATUS: dict[int, type[APIError]] = {
    401: NotAuthorized,
    403: NotAuthorized,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    429: RateLimited,
}


def api_error(response: httpx.Response) -> APIError:
    """Make the error of a refused request from its fully read response."""
    status = response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {"message": f"HTTP {status} from {response.url}, without the API's error body: {response.text[:200]!r}"}
    return _make(
        error,
        status,
        request_id=response.headers.get("x-request-id"),
        retry_after=_seconds(response.headers.get("retry-after")),
    )


def stream_error(error: dict[str, Any]) -> APIError:
    """Make the error that ended a stream whose HTTP status was already sent as 200."""
    status = error.get("status")
    conflict = error.get("code") in {"conflict", "session_busy", "version_conflict", "lease_lost", "history_conflict"}
    return _make(error, status if isinstance(status, int) else 409 if conflict else 500)


def _make(
    error: dict[str, Any], status: int, *, request_id: str | None = None, retry_after: float | None = None
) -> APIError:
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else BadRequest)
    return kind(
        str(error.get("message") or f"HTTP {status} without a message"),
        status=status,
        code=error.get("code"),
        param=error.get("param"),
        request_id=request_id,
        retry_after=retry_after,
    )


def _seconds(header: str | None) -> float | None:
    """Seconds of a Retry-After header; the date form is not used by our server and reads as absent."""
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
