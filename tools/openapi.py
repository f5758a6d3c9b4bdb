"""The OpenAPI document of any server, and what of it the TypeScript types are made from.

`python -m tools.openapi` prints the latter; `make typescript` gives it to openapi-typescript.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from typing import Any

from nested_runtime.store.memory import MemoryStore
from server.app import create_app
from server.assembly import build_service
from server.openapi import document
from server.settings import Settings

__all__ = ["digest", "session_api", "the_document"]

EXTRA = ("SessionRef", "MemoryOptions")  # of turns: beside OpenAI's own types


@cache
def the_document() -> dict[str, Any]:
    """What /openapi.json says, but for the names of the models served."""
    service = build_service(Settings(models=("none",), store="memory:"), MemoryStore(), [])
    return document(create_app(service), [])


@cache
def session_api() -> dict[str, Any]:
    """The session routes, each with its one good answer and its errors as one, and the schemas they need."""
    whole = the_document()
    paths: dict[str, Any] = {}
    for path, methods in whole["paths"].items():
        if path.startswith("/v1/sessions"):
            paths[path] = {method: _short(operation) for method, operation in methods.items()}
    known = whole["components"]["schemas"]
    wanted, found = [*EXTRA, *_named(paths)], {}
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = known[name]
            wanted += _named(found[name])
    components = {"schemas": {name: found[name] for name in sorted(found)}}
    info = {"title": "Nested Runtime: sessions", "version": whole["info"]["version"]}
    made: dict[str, Any] = _untitled({"openapi": whole["openapi"], "info": info, "paths": paths})
    return {**made, "components": _untitled(components)}


def digest() -> str:
    """Of what the types are made from, texts and the order of names aside."""
    return hashlib.sha256(json.dumps(_untitled(session_api(), texts=False), sort_keys=True).encode()).hexdigest()[:16]


def _short(operation: dict[str, Any]) -> dict[str, Any]:
    responses = operation["responses"]
    refused = {"description": "Refused", "content": responses["400"]["content"]}
    name = re.sub(r"_v1_.*", "", operation["operationId"])
    return {**operation, "operationId": name, "responses": {"200": responses["200"], "default": refused}}


def _named(value: Any) -> list[str]:
    """The schemas a piece of the document refers to."""
    return re.findall(r'"#/components/schemas/(\w+)"', json.dumps(value))


def _untitled(value: Any, *, texts: bool = True) -> Any:
    """Without the titles pydantic makes of names; without descriptions too if there shall be no `texts`."""
    unwanted = {"title"} if texts else {"title", "description", "summary"}
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (k in unwanted and isinstance(v, str))}
        return {k: v if k == "info" else _untitled(v, texts=texts) for k, v in kept.items()}
    return [_untitled(one, texts=texts) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    print(json.dumps(session_api(), indent=1))
