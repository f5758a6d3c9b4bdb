"""`nested admin` and the SDK's Admin against a real server with keys of two tenants."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.python import Admin, AsyncAdmin, Client, NotAuthorized, ServerError

NESTED = str(Path(sys.executable).parent / "nested")
ADMIN = "key-of-the-admin"
Nested = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def guarded(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A server with the tenants anne and b/t."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text("anne key-of-anne\nb/t key-of-bert\n")
    (folder / "admin").write_text(ADMIN)
    return start_server("--api-key-file", str(folder / "keys"), "--admin-key-file", str(folder / "admin"))


@pytest.fixture
def nested(guarded: str) -> Nested:
    def run(*args: str, key: str = ADMIN) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NESTED_")}
        env = {**kept, "NESTED_BASE_URL": guarded, "NESTED_ADMIN_KEY": key, "NESTED_API_KEY": "key-of-anne"}
        command = [NESTED, "admin", *args]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )

    return run


def told(guarded: str, key: str, *sessions: str) -> None:
    with Client(guarded, key) as client:
        for session in sessions:
            client.session(session).learn("x")


def test_admin_commands(guarded: str, nested: Nested) -> None:
    told(guarded, "key-of-anne", "one", "u1-a", "u1-b")
    told(guarded, "key-of-bert", "a/b%2F", "two")
    stats = json.loads(nested("stats", "--json").stdout)
    assert (stats["accepting"], stats["store"]["sessions"]) == (True, 5)
    assert "store.sessions  5\n" in nested("stats").stdout
    rows = nested("sessions").stdout.splitlines()
    assert rows[0].split() == ["tenant", "id", "version", "tokens", "bytes", "updated"]
    assert [row.split()[:2] for row in rows[1:4]] == [["anne", "one"], ["anne", "u1-a"], ["anne", "u1-b"]]
    assert len(json.loads(nested("sessions", "--tenant", "b/t", "--json").stdout)) == 2
    shown = json.loads(nested("show", "b/t", "a/b%2F", "--json").stdout)
    assert (shown["tenant"], shown["id"], [one["kind"] for one in shown["history"]]) == ("b/t", "a/b%2F", ["learn"])
    assert nested("flush").stdout.startswith("0 states unwritten; durability: ")
    assert nested("evict", "--tenant", "b/t").stdout == "2 resident states dropped\n"
    assert nested("fsck").stdout == "healthy\n"
    asked = nested("delete", "b/t", "a/b%2F")
    assert (asked.returncode, "--yes" in asked.stderr) == (2, True)
    assert json.loads(nested("delete", "b/t", "a/b%2F", "--yes", "--json").stdout) == {"deleted": 1}
    assert nested("delete", "b/t", "a/b%2F", "--yes").stdout == "a/b%2F did not exist\n"
    assert nested("erase", "anne", "--prefix", "u1-", "--yes").stdout == "2 sessions of anne are erased\n"
    assert nested("erase", "b/t", "--yes").stdout == "1 sessions of b/t are erased\n"
    assert [row["id"] for row in json.loads(nested("sessions", "--json").stdout)] == ["one"]


def test_another_key_is_refused(nested: Nested) -> None:
    done = nested("stats", key="key-of-anne")
    assert done.returncode == 2
    assert "admin key" in done.stderr


def test_a_damaged_store_is_named(start_server: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    file = tmp_path / "sessions.db"
    url = start_server("--store", f"sqlite:///{file}", "--admin-key-file", str(tmp_path / "admin"))
    told(url, "", "whole", "broken")
    with sqlite3.connect(file) as db:
        db.execute("UPDATE versions SET state = zeroblob(size) WHERE sid = 2")
    db.close()
    env = {**os.environ, "NESTED_BASE_URL": url, "NESTED_ADMIN_KEY": ADMIN}
    done = subprocess.run([NESTED, "admin", "fsck"], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "'broken' version 1" in done.stdout
    assert "whole" not in done.stdout


def test_the_sdk(guarded: str, connect: Callable[..., Any]) -> None:
    told(guarded, "key-of-anne", "sdk")
    call = connect(guarded, ADMIN)
    admin: Any = (Admin if isinstance(call.client, Client) else AsyncAdmin)(call.client)
    assert call(admin.show("anne", "sdk")).version >= 1
    assert "sdk" in [session.id for session in call(admin.sessions("anne"))]
    assert call(admin.fsck()) == []
    assert call(admin.delete("anne", "sdk")) == 1
    anne = connect(guarded, "key-of-anne")
    refused: Any = (Admin if isinstance(anne.client, Client) else AsyncAdmin)(anne.client)
    with pytest.raises(NotAuthorized):
        anne(refused.stats())


def test_drain(start_server: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    url = start_server("--admin-key-file", str(tmp_path / "admin"))
    env = {**os.environ, "NESTED_BASE_URL": url, "NESTED_ADMIN_KEY": ADMIN}
    done = subprocess.run([NESTED, "admin", "drain"], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "drained: no turn is running\n"
    with Client(url, retries=0) as client, pytest.raises(ServerError) as refused:
        client.chat("hi")
    assert refused.value.status == 503
