"""The answers of the session API are those of the OpenAPI document: every operation, every field, nothing more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import httpx
import pytest
from pydantic import TypeAdapter
from typing_extensions import is_typeddict

from server.schemas.bodies import BODIES, Consolidated, SessionRef, Turned

Chat = Callable[..., httpx.Response]


def misnamed(kind: Any, value: Any, where: str = "") -> list[str]:
    """Fields of `value` that `kind` does not have, however deep."""
    if is_typeddict(kind) and isinstance(value, dict):
        fields = get_type_hints(kind)
        found = [f"{where}.{name}" for name in value if name not in fields]
        return found + [
            one for name in fields if name in value for one in misnamed(fields[name], value[name], where + f".{name}")
        ]
    if get_origin(kind) is list:
        return [one for item in value for one in misnamed(get_args(kind)[0], item, f"{where}[]")]
    return []


def check(kind: Any, answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    TypeAdapter(kind).validate_json(answer.content, strict=True)
    body = answer.json()
    assert misnamed(kind, body) == []
    return body


def test_every_operation_answers_what_the_document_says(client: httpx.Client, chat: Chat) -> None:
    """One story through all of them; `seen` makes sure that it is all."""
    seen: set[tuple[str, str]] = set()

    def ask(method: str, path: str, template: str, **options: Any) -> Any:
        seen.add((template, method))
        return check(BODIES[template, method], client.request(method.upper(), path, **options))

    one = "/v1/sessions/{id}"

    def of(method: str, rest: str = "", **options: Any) -> Any:
        return ask(method, f"/v1/sessions/bodies{rest}", one + rest, **options)

    ask("post", "/v1/sessions", "/v1/sessions", json={"id": "bodies"})
    of("post", "/learn", json={"text": "my name is Ada"})
    assert of("post", "/learn", json={"text": "Ada", "surprise": True})["session"]["surprise"]
    kept = of("post", "/snapshot", json={"label": "x"})
    of("get", "/snapshots")
    of("get", "/history")
    of("get", "/levels")
    of("post", "/reset")
    of("post", "/restore", json={"snapshot": kept["snapshot"]})
    of("post", "/fork", json={"id": "bodies-2"})
    blob = client.get("/v1/sessions/bodies/export").content
    of("put", "/import", content=blob, headers={"Content-Type": "application/octet-stream"})
    of("get")
    ask("delete", f"/v1/sessions/bodies/snapshots/{kept['snapshot']}", f"{one}/snapshots/{{snapshot}}")
    assert ask("get", "/v1/sessions?limit=1", "/v1/sessions")["next"]
    of("delete")
    ask("get", "/v1/models", "/v1/models")
    ask("get", "/v1/models/tiny", "/v1/models/{id}")
    turns = {operation for operation, body in BODIES.items() if body is Turned}
    elsewhere = {operation for operation, body in BODIES.items() if body is Consolidated}  # needs levels
    assert seen | turns | elsewhere == set(BODIES)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 4}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 4}),
    ],
)
def test_a_turn_says_what_became_of_the_session(client: httpx.Client, path: str, asked: dict[str, Any]) -> None:
    body = client.post(path, json={"model": "tiny", "session_id": f"turned-{path}", **asked}).json()
    TypeAdapter(SessionRef).validate_python(body["session"], strict=True)
    assert misnamed(SessionRef, body["session"]) == []


def test_every_session_operation_has_a_schema(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"]["content"]
            if path.startswith("/v1/sessions") and path != "/v1/sessions/{id}/export":
                assert (path, method) in BODIES, f"say in server/schemas/bodies.py what {method} {path} answers"
                reference = content["application/json"]["schema"]["$ref"]
                assert reference.rsplit("/", 1)[1] in document["components"]["schemas"]
