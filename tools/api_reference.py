"""docs/api.md, from the OpenAPI document: `python -m tools.api_reference` writes it, a test compares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.openapi import the_document

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """\
# HTTP API

<!-- made by `make docs` from the OpenAPI document; a test fails when it is stale -->

Every server has the document itself at `/openapi.json`. Paths under `/v1` also work without it. Errors are
`{"error": {"message", "type", "param", "code"}}`. How sessions, retries and streams behave:
[OpenAI clients](openai.md), [Serving](serving.md).
"""
TITLES = {
    "chat": "Chat",
    "completions": "Completions",
    "responses": "Responses",
    "models": "Models",
    "sessions": "Sessions",
    "health": "Health",
    "admin": "Administration",
}


def page() -> str:
    """The whole page: operations by topic, then the objects they take and give."""
    document = the_document()
    parts = [HEAD]
    for tag, title in TITLES.items():
        parts.append(f"## {title}\n")
        parts += [_operation(path, method, one) for path, method, one in _operations(document) if tag in one["tags"]]
    parts.append("## Objects\n")
    for name, schema in sorted(document["components"]["schemas"].items()):
        if schema.get("properties") and name not in {"HTTPValidationError", "ValidationError"}:
            parts.append(f"### {name}\n")
            if about := schema.get("description"):
                parts.append(f"{_line(about)}\n")
            parts.append(_fields(schema))
    return "\n".join(parts)


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    lines = [f"### {method.upper()} {path}\n", f"{_line(operation['description'])}\n"]
    rows = []
    for parameter in operation.get("parameters", ()):
        if parameter["in"] != "path":
            about = parameter.get("description", "")
            rows.append((f"{parameter['name']} ({parameter['in']})", _type(parameter["schema"]), about))
    if rows:
        lines += [_table(("parameter", "type", "what"), rows)]
    if body := operation.get("requestBody"):
        lines.append(
            f"Body: {_contents(body['content'])}. Answer: {_contents(operation['responses']['200']['content'])}.\n"
        )
    else:
        lines.append(f"Answer: {_contents(operation['responses']['200']['content'])}.\n")
    refused = [code for code in operation["responses"] if code[0] != "2"]
    if refused:
        lines.append(f"Refusals: {', '.join(refused)}.\n")
    return "\n".join(lines)


def _contents(content: dict[str, Any]) -> str:
    found = []
    for kind, one in content.items():
        schema = _type(one["schema"]) if one.get("schema") else ""
        found.append(schema if kind == "application/json" and schema else f"`{kind}`")
    return " or ".join(found)


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = []
    for name, one in schema["properties"].items():
        default = f"; default `{json.dumps(one['default'])}`" if one.get("default") is not None else ""
        about = f"{one.get('description', '')}{default}".removeprefix("; ")
        rows.append((name + ("" if name in required else "?"), _type(one), about))
    return _table(("field", "type", "what"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    cells = [f"| `{name}` | {kind.replace('|', chr(92) + '|')} | {_line(about)} |" for name, kind, about in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---|---|---|", *cells]) + "\n"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if reference := schema.get("$ref"):
        name = reference.rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "allOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(one)}`" for one in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = [f"{sign} {schema[key]}" for key, sign in (("minimum", ">="), ("maximum", "<=")) if key in schema]
    return " ".join([str(schema.get("type", "any")), *bounds])


def _line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
