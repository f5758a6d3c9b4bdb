"""Keys and tenants: every route but /health, /ready and the web page asks for a key; foreign sessions do not exist."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nested_runtime.errors import ConfigError
from server.auth import Keys
from server.settings import Settings

Chat = Callable[..., httpx.Response]
ANNE, BERT, ADMIN = "key-of-anne", "key-of-bert", "key-of-admin"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(serve: Any, settings: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("keys")
    keys, admin = folder / "keys", folder / "admin"
    keys.write_text(f"# two tenants\nanne {ANNE}\n\nbert sha256:{hashlib.sha256(BERT.encode()).hexdigest()}\n")
    admin.write_text(ADMIN)
    with serve(settings(api_key_file=keys, admin_key_file=admin)) as server:
        yield server


@pytest.fixture
def http(guarded: Any) -> Iterator[httpx.Client]:
    with guarded.client() as client:
        yield client


def walk(server: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route, aliases included, as the running app has them."""
    schema = server.app.openapi()
    for path, methods in schema["paths"].items():
        for method in methods:
            filled = re.sub(r"\{[^}]*\}", "x", path)
            yield method.upper(), filled
            if filled.startswith("/v1/"):
                yield method.upper(), filled.removeprefix("/v1")
    yield from (("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/web", "/nowhere", "/admin"))


def test_every_route_asks_for_a_key(guarded: Any, http: httpx.Client) -> None:
    found = list(walk(guarded))
    assert len(found) > 50
    wrong = [{}, bearer("wrong-key"), {"Authorization": "Bearer"}, {"Authorization": ANNE}, {"X-API-Key": "nothing"}]
    for method, path in found:
        for headers in wrong:
            reply = http.request(method, path, headers=headers)
            if path in ("/health", "/ready"):
                assert reply.status_code == 200
            else:
                assert reply.status_code == 401, (method, path)
                assert reply.json()["error"]["code"] == "invalid_api_key"


def test_admin_routes_ask_for_the_admin_key(guarded: Any, http: httpx.Client) -> None:
    admin = [(method, path) for method, path in walk(guarded) if path.startswith("/admin/")]
    assert len(admin) >= 8
    for method, path in admin:
        assert http.request(method, path, headers=bearer(ANNE)).status_code == 401, path
    assert http.get("/admin/stats", headers=bearer(ADMIN)).status_code == 200
    assert http.get("/v1/models", headers=bearer(ADMIN)).status_code == 401


def test_without_an_admin_key_the_admin_api_is_off(client: httpx.Client) -> None:
    assert client.get("/admin/stats").status_code == 404
    assert client.get("/admin/stats", headers=bearer("anything")).status_code == 404


def test_tenants_do_not_see_each_other(http: httpx.Client, chat: Chat) -> None:
    assert chat(http, "hi", session="shared", headers=bearer(ANNE)).json()["session"]["version"] == 1
    absent = http.get("/v1/sessions/never", headers=bearer(BERT))
    foreign = http.get("/v1/sessions/shared", headers=bearer(BERT))
    assert foreign.status_code == absent.status_code == 404
    assert foreign.json()["error"]["message"].replace("shared", "never") == absent.json()["error"]["message"]
    for method, path in [
        ("DELETE", ""),
        ("POST", "/reset"),
        ("GET", "/export"),
        ("GET", "/history"),
        ("GET", "/levels"),
        ("POST", "/consolidate"),
    ]:
        assert http.request(method, f"/v1/sessions/shared{path}", headers=bearer(BERT)).status_code == 404
    mine = chat(http, "hi", session="shared", headers=bearer(BERT)).json()["session"]
    assert mine["version"] == 1
    assert [s["id"] for s in http.get("/v1/sessions", headers=bearer(BERT)).json()["data"]] == ["shared"]
    assert http.delete("/v1/sessions/shared", headers=bearer(BERT)).status_code == 200
    assert http.get("/v1/sessions/shared", headers=bearer(ANNE)).status_code == 200


def test_admin_sees_and_erases(http: httpx.Client, chat: Chat) -> None:
    for name in ("u1-a", "u1-b", "u2-a", "u%"):
        assert chat(http, "hi", session=name, headers=bearer(BERT)).status_code == 200
    admin = bearer(ADMIN)
    listed = http.get("/admin/sessions?tenant=bert", headers=admin).json()["data"]
    assert {s["id"] for s in listed} >= {"u1-a", "u1-b", "u2-a", "u%"}
    assert http.get("/admin/tenants/bert/sessions/u1-a", headers=admin).json()["history"][0]["version"] == 1
    assert http.delete("/admin/tenants/bert?prefix=u%25", headers=admin).json() == {"deleted": 1}
    assert http.delete("/admin/tenants/bert?prefix=u1-", headers=admin).json() == {"deleted": 2}
    assert http.get("/v1/sessions/u2-a", headers=bearer(BERT)).status_code == 200
    assert http.post("/admin/evict", headers=admin).json()["evicted"] >= 1
    assert http.post("/admin/flush", headers=admin).json()["unwritten"] == 0
    assert http.post("/admin/fsck", headers=admin).json() == {"healthy": True, "problems": []}
    assert http.delete("/admin/tenants/bert", headers=admin).json()["deleted"] >= 1
    assert http.get("/v1/sessions", headers=bearer(BERT)).json()["data"] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no keys"),
        ("# only this", "no keys"),
        ("a b c", "3 words"),
        ("anne short", "at least"),
        ("anne sha256:xyz", "64 hex"),
        ("anne same-key-x\nbert same-key-x", "twice"),
    ],
)
def test_a_bad_key_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=says):
        Keys.load(tmp_path / "keys")


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(tmp_path / "nothing")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_addresses_need_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        Settings(models=("x",), host=host)
    assert Settings(models=("x",), host=host, insecure=True).host == host
    assert Settings(models=("x",), host=host, api_key_file=Path("keys")).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_does_not(host: str) -> None:
    assert Settings(models=("x",), host=host).is_local
