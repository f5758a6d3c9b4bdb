"""Exceptions as OpenAI's error objects: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from nested_runtime.errors import (
    Conflict,
    NestedError,
    NotFound,
    Overloaded,
    RequestError,
    StateError,
    StateMismatch,
    StoreUnavailable,
    UpdateDiverged,
)

__all__ = ["ErrorBody", "error_body", "error_headers", "error_response", "install", "status_of"]

logger = logging.getLogger("nested.server")

STATUSES: tuple[tuple[type[NestedError], int], ...] = (
    (RequestError, 400),
    (NotFound, 404),
    (Conflict, 409),
    (StateMismatch, 409),
    (StateError, 422),
    (UpdateDiverged, 422),
    (Overloaded, 429),
    (StoreUnavailable, 503),
)
BY_CODE = {"idempotency_key_reused": 422, "shutting_down": 503}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    429: "overloaded",
}
RETRY_SECONDS = 2
TYPE_TAG = re.compile(r"(str|int|float|bool|list\[.*|dict\[.*)$")


def status_of(error: BaseException) -> int:
    """The HTTP status of an exception."""
    if isinstance(error, HTTPException):
        return error.status_code
    if not isinstance(error, NestedError):
        return 500
    if error.code in BY_CODE:
        return BY_CODE[error.code]
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status)
    if kind is None:
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: BaseException) -> dict[str, Any]:
    """The error object of an exception; unexpected ones say nothing about the inside."""
    status = status_of(error)
    if isinstance(error, NestedError):
        return error_body(str(error), status, param=getattr(error, "param", None), code=error.code)
    if isinstance(error, HTTPException):
        return error_body(str(error.detail), status, code=CODES.get(status))
    return error_body("the server failed unexpectedly; the request id is in its log", 500, code="internal_error")


def error_headers(error: BaseException) -> dict[str, str]:
    """Retry-After where waiting helps, x-should-retry: false where trying again by itself would be wrong."""
    status = status_of(error)
    if isinstance(error, HTTPException):
        return dict(error.headers or {})
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, round(error.retry_after)))}
    if status == 503:
        return {"Retry-After": str(RETRY_SECONDS)}
    if status == 409 or isinstance(error, UpdateDiverged):
        return {"x-should-retry": "false"}
    return {}


def error_response(error: BaseException, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The HTTP answer to an exception."""
    return JSONResponse(body_of(error), status_of(error), headers={**error_headers(error), **(headers or {})})


def _invalid(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = [str(part).encode("utf-8", "replace").decode() for part in first.get("loc", ())[1:]]
    place = place[: next((i for i, part in enumerate(place) if TYPE_TAG.match(part)), None)]  # members of a union
    if first.get("type") == "json_invalid":
        return JSONResponse(
            error_body(
                f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}", 400, code="invalid_json"
            ),
            400,
        )
    param = ".".join(place) or None
    offending = "" if first.get("type") == "missing" else f" (got {_shown(first.get('input'))})"
    message = f"{param or 'request body'}: {first.get('msg', 'is invalid')}{offending}"
    return JSONResponse(error_body(message, 400, param=param, code=_code_of(str(first.get("type")))), 400)


def _code_of(kind: str) -> str:
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def install(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""

    async def on_nested(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, Conflict | StateMismatch):
            request.app.state.service.metrics.conflicts.labels(error.code).inc()
        if status_of(error) >= 500:
            logger.error("request failed: %s", error, exc_info=error)
        return error_response(error)

    async def on_invalid(_request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            return error_response(error)
        return _invalid(error)

    async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, {"X-Request-Id": request.scope["state"]["request_id"]})

    app.add_exception_handler(Exception, on_unexpected)
    app.add_exception_handler(NestedError, on_nested)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_nested)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail
