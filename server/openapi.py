"""The OpenAPI document: what FastAPI knows, and what it cannot know because the middleware or a handler does it.

Keys, headers, event streams, the statuses an operation can really answer with, and the names of the served models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse

from .deps import Service
from .errors import error_response
from .middleware import OPEN
from .schemas import bodies

__all__ = ["document", "install"]

ALWAYS = ("400", "401", "404", "413", "429", "500", "503")
MEMORY = ("409", "422")  # where a session or an idempotency key is involved
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
TEXTS = {
    "400": "The request is malformed, or asks for what cannot be done; `param` names what is wrong",
    "401": "The key is missing or wrong",
    "404": "There is no such thing, or it is another tenant's",
    "409": "The session is busy or at another version, or holds a memory of another model",
    "413": "The body is over the limit",
    "422": "The bytes are no valid memory, or the idempotency key was used with another body",
    "429": "Too many sessions, or too much waiting",
    "500": "The server failed",
    "503": "The store does not answer, or the server is shutting down",
}
HEADERS = (
    ("X-Session-ID", "The session whose memory reads this and learns it. Absent: memoryless", 256),
    ("Idempotency-Key", "A second request with the same key and body gets the first one's answer", 256),
    ("X-Request-Id", "Repeated in the answer and in the log; one of the server's own if it is not plain ASCII", None),
)
VISIBLE = "^[!-~]+$"
BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
ANSWERS = {
    "/v1/sessions/{id}/export": BYTES,
    "/metrics": {"text/plain": {"schema": {"type": "string"}}},
}
Operation = dict[str, Any]


def install(app: FastAPI, service: Service) -> None:
    """Make `app` serve the document."""

    def served() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = document(app, list(service.runtime.models))
        return app.openapi_schema

    async def on_wrong_method(request: Request, error: Exception) -> JSONResponse:
        """Every method of the path: Starlette names those of one route only."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        found = {method for one in (path, f"/v1{path}") for method in _methods(served(), one)}
        return error_response(error, {"Allow": ", ".join(sorted(found))} if found else {})

    app.openapi = served  # type: ignore[method-assign]  # FastAPI's documented way
    app.add_exception_handler(405, on_wrong_method)


def _methods(document: dict[str, Any], path: str) -> Iterator[str]:
    for template, methods in document["paths"].items():
        if re.fullmatch("[^/]+".join(re.escape(part) for part in re.split(r"\{\w+\}", template)), path):
            yield from (method.upper() for method in methods)


def document(app: FastAPI, names: list[str]) -> dict[str, Any]:
    """The whole document; `names` are the models served, empty = any."""
    made = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, servers=app.servers
    )
    components = made.setdefault("components", {})
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Needed when the server has an --api-key-file"},
        "adminKey": {"type": "http", "scheme": "bearer", "description": "Of the --admin-key-file"},
    }
    answers, schemas = bodies.schemas()
    components["schemas"] |= schemas
    for schema in components["schemas"].values():
        model = schema.get("properties", {}).get("model")
        if model is not None:
            _name_models(model, names)
        if names and "model" in schema.get("example", {}):
            schema["example"] = {**schema["example"], "model": names[0]}
    for path, method, operation in _operations(made):
        if (path, method) in answers:
            operation["responses"]["200"]["content"] = {"application/json": {"schema": answers[path, method]}}
        _describe(path, operation, names)
    return made


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, Operation]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _describe(path: str, operation: Operation, names: list[str]) -> None:
    answers = {code: made for code, made in operation["responses"].items() if code[0] == "2"}
    if path == "/ready":
        answers["503"] = {**answers["200"], "description": "Not ready, and why"}
    if path not in OPEN:
        operation["security"] = [{"adminKey": []}] if path.startswith("/admin/") else [{"key": []}]
        codes = (*ALWAYS, *MEMORY) if path.startswith("/v1/") else ALWAYS
        answers |= {code: {"description": TEXTS[code], "content": ERROR} for code in sorted(codes)}
    operation["responses"] = answers
    for parameter in operation.get("parameters", ()):
        _bound(parameter, names)
    if path in ANSWERS:
        answers["200"]["content"] = ANSWERS[path]
    if path == "/v1/sessions/{id}/import":
        operation["requestBody"] = {"required": True, "content": BYTES}
    if path in GENERATING:
        answers["200"]["content"]["text/event-stream"] = {}
        answers["200"]["headers"] = {"X-Session-Version": {"schema": {"type": "string", "pattern": "^[0-9]+$"}}}
        operation.setdefault("parameters", []).extend(_header(*header) for header in HEADERS)


def _header(name: str, about: str, length: int | None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if length is not None:
        schema |= {"minLength": 1, "maxLength": length, "pattern": VISIBLE}
    return {"name": name, "in": "header", "required": False, "description": about, "schema": schema}


def _bound(parameter: dict[str, Any], names: list[str]) -> None:
    """What the handlers check by hand, said in the parameter's schema."""
    schema = parameter["schema"]
    if parameter["name"] == "if-match":
        parameter["schema"] = {"type": "string", "pattern": '^([0-9]{1,15}|"[0-9]{1,15}"|\\*)$'}
        parameter["description"] = "The version the caller believes is the newest; 409 if it is not"
    elif parameter["name"] == "model":
        _name_models(schema, names)
    elif parameter["in"] == "path" and schema.get("type") == "string":
        schema |= {"minLength": 1, "maxLength": 256}


def _name_models(schema: dict[str, Any], names: list[str]) -> None:
    for part in schema.get("anyOf", (schema,)):
        if names and part.get("type") == "string":
            part["enum"] = names
