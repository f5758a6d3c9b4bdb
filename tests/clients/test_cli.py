"""The `nested` command as people run it: a process, its output, its exit status, against a real server."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.cli.output import visible
from clients.python import Client

NESTED = str(Path(sys.executable).parent / "nested")
NewId = Callable[[], str]
Nested = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NESTED_")}
    return {**kept, **extra}


@pytest.fixture
def nested(url: str) -> Nested:
    """Run the command against the server."""

    def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        env = environment(NESTED_BASE_URL=url)
        options = {"text": True, "stdin": None if "input" in options else subprocess.DEVNULL} | options
        if options["stdin"] is None:
            del options["stdin"]
        return subprocess.run([NESTED, *args], env=env, capture_output=True, timeout=120, check=False, **options)

    return run


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line a failed command prints."""
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def session(url: str, new_id: NewId) -> str:
    """A session that was told something."""
    name = new_id()
    with Client(url) as client:
        client.session(name).chat("My dog is called Rex.", temperature=0, max_tokens=6)
    return name


def test_chat_with_one_message(nested: Nested, url: str, new_id: NewId) -> None:
    name = new_id()
    options = ("--session", name, "--temperature", "0", "--max-tokens", "8")
    streamed = ok(nested("chat", *options, "hello"))
    whole = json.loads(ok(nested("chat", *options, "--json", "hello")))
    assert whole["session"]["id"] == name
    assert whole["session"]["version"] == 2
    with Client(url) as client:
        other = client.session(new_id()).chat("hello", temperature=0, max_tokens=8)
    assert streamed.rstrip("\n") == visible(other.text).rstrip("\n")


def test_chat_from_a_pipe(nested: Nested, session: str) -> None:
    lines = "/memory\n/snapshot\n\nhello\n/reset\n/help\n/quit\nnever said\n"
    out = ok(nested("chat", "--session", session, "--no-stream", "--max-tokens", "4", input=lines))
    assert re.search(r"^version +1$", out, re.MULTILINE)
    assert "keeps version 1" in out
    assert "forgot everything; now at version 3" in out
    assert "/restore" in out
    assert json.loads(ok(nested("sessions", "show", session, "--json")))["version"] == 3


def test_chat_restores(nested: Nested, session: str) -> None:
    digest = json.loads(ok(nested("--json", "sessions", "show", session)))["digest"]
    ok(nested("chat", "--session", session, "--max-tokens", "4", "My cat is called Tom."))
    assert "back at 1, now version 3" in ok(nested("chat", "--session", session, input="/restore 1\n"))
    assert json.loads(ok(nested("sessions", "show", session, "--json")))["digest"] == digest


def test_chat_without_a_session_has_no_memory_commands(nested: Nested) -> None:
    assert "--session" in refused(nested("chat", input="/memory\n"), 2)
    assert "/help" in refused(nested("chat", input="/nonsense\n"), 2)


def read_until(fd: int, text: str, seconds: float = 60.0) -> str:
    seen = b""
    deadline = time.monotonic() + seconds
    while text.encode() not in seen:
        assert time.monotonic() < deadline, f"{text!r} did not come, only {seen!r}"
        if select.select([fd], [], [], 0.2)[0]:
            seen += os.read(fd, 4096)
    return seen.decode(errors="replace")


def test_chat_at_a_terminal(url: str, new_id: NewId) -> None:
    main, child = pty.openpty()
    command = [NESTED, "chat", "--session", new_id(), "--max-tokens", "4"]
    process = subprocess.Popen(
        command,
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment(NESTED_BASE_URL=url, TERM="dumb"),
        close_fds=True,
    )
    os.close(child)
    try:
        read_until(main, "> ")
        os.write(main, b"hello\n")
        read_until(main, "> ")
        os.write(main, b"/reset no-such-level\n")
        assert "levels" in read_until(main, "\n> ")
        os.write(main, b"/memory\n")
        assert "version" in read_until(main, "\n> ")
        os.write(main, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_sessions_look_and_change(nested: Nested, session: str, new_id: NewId) -> None:
    assert session in ok(nested("sessions", "list"))
    listed = json.loads(ok(nested("sessions", "list", "--json")))
    assert session in {one["id"] for one in listed}
    kept = json.loads(ok(nested("sessions", "snapshot", session, "--json")))
    assert kept["snapshot"] in ok(nested("sessions", "snapshots", session))
    assert "forgot everything" in ok(nested("sessions", "reset", session))
    assert "version 3" in ok(nested("sessions", "restore", session, "--snapshot", kept["snapshot"]))
    history = json.loads(ok(nested("sessions", "history", session, "--json")))
    assert [one["kind"] for one in history] == ["restore", "reset", "turn"]
    assert "restore" in ok(nested("sessions", "history", session))
    twin = new_id()
    assert twin in ok(nested("sessions", "fork", session, twin, "--version", "1"))
    assert json.loads(ok(nested("sessions", "show", twin, "--json")))["digest"] == history[-1]["digest"]


def test_sessions_delete_asks(nested: Nested, session: str) -> None:
    assert "--yes" in refused(nested("sessions", "delete", session), 2)
    assert "erased" in ok(nested("sessions", "delete", session, "--yes"))
    assert session in refused(nested("sessions", "show", session), 2)


def test_sessions_export_and_import(nested: Nested, session: str, new_id: NewId, tmp_path: Path) -> None:
    file, copy = tmp_path / "memory.safetensors", new_id()
    assert str(file) in ok(nested("sessions", "export", session, str(file)))
    assert file.stat().st_mode & 0o077 == 0, "a memory is private"
    assert "--force" in refused(nested("sessions", "export", session, str(file)), 2)
    ok(nested("sessions", "export", session, str(file), "--force"))
    ok(nested("sessions", "import", copy, str(file)))
    digests = {json.loads(ok(nested("sessions", "show", one, "--json")))["digest"] for one in (session, copy)}
    assert len(digests) == 1
    assert list(tmp_path.iterdir()) == [file]
    piped = nested("sessions", "export", session, "-", text=False)
    assert bytes(piped.stdout) == file.read_bytes()


def test_a_file_that_cannot_be_used(nested: Nested, session: str, tmp_path: Path) -> None:
    assert "no/such" in refused(nested("sessions", "import", session, "no/such/file"), 2)
    assert "no/such" in refused(nested("sessions", "export", session, "no/such/file"), 2)
    hostile = tmp_path / "hostile"
    hostile.write_bytes(b"\x80\x04not a memory")
    refused(nested("sessions", "import", session, str(hostile)), 2)
    assert json.loads(ok(nested("sessions", "show", session, "--json")))["version"] == 1


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("sessions",),
        ("sessions", "show"),
        ("sessions", "restore", "s"),
        ("sessions", "restore", "s", "--version", "one"),
        ("chat", "--session", ""),
        ("chat", "--session", "x" * 257, "hello"),
        ("chat", "--timeout", "0", "hello"),
        ("--base-url", "localhost:8000", "sessions", "list"),
        ("sessions", "list", "--base-url", "localhost:8000"),
        ("sessions", "show", "never-was"),
        ("chat", "--model", "no-such-model", "hello"),
        ("chat", "--temperature", "99", "hello"),
    ],
)
def test_wrong_use_is_status_2_and_one_line(nested: Nested, args: tuple[str, ...]) -> None:
    refused(nested(*args), 2)


def test_errors_as_json(nested: Nested) -> None:
    done = nested("sessions", "show", "never-was", "--json")
    assert done.returncode == 2
    error = json.loads(done.stderr)["error"]
    assert (error["status"], error["kind"]) == (404, "NotFound")


def test_no_server_is_status_1(nested: Nested) -> None:
    assert "is the server running" in refused(nested("--base-url", "http://127.0.0.1:9", "sessions", "list"), 1)


def test_doctor(nested: Nested, model_folder: Path, tmp_path: Path) -> None:
    here = ("--model", str(model_folder), "--store", f"sqlite:///{tmp_path / 'new.db'}")
    findings = {one["check"]: one for one in json.loads(ok(nested("doctor", "--json", *here)))}
    assert findings["server"]["state"] == findings["/ready"]["state"] == "ok"
    assert findings["models"]["detail"] == "tiny"
    assert "durability=fsynced" in findings["/version"]["detail"]
    assert findings["kernels/cpu"]["detail"].startswith(("native", "numba"))
    assert findings["store"] == {
        "check": "store",
        "state": "ok",
        "detail": "SqliteStore: 0 sessions, 0 bytes; durability fsynced",
    }
    assert findings[f"model/{model_folder}"]["detail"].startswith("tiny: ")
    has_gpu = torch.cuda.is_available()
    assert (findings["gpu"]["state"], "kernels/cuda" in findings) == ("ok" if has_gpu else "note", has_gpu)


def test_a_sick_doctor(nested: Nested, tmp_path: Path) -> None:
    """A server that does not answer, a store that is none and a model that is not there are each named."""
    (tmp_path / "text.db").write_text("no database, " * 100)
    missing = ("--model", "no-such-model", "--store", f"sqlite:///{tmp_path / 'text.db'}")
    sick = nested("doctor", "--base-url", "http://127.0.0.1:9", *missing)
    assert sick.returncode == 1
    assert {line.split()[1] for line in sick.stdout.splitlines() if line.startswith("fail")} == {
        "server",
        "store",
        "model/no-such-model",
    }


def test_learning_a_file(nested: Nested, session: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("The dog is called Rex.\n\n   \nThe cat is\ncalled Tom.\n")
    assert f"{session} learned 2 paragraphs; it is at version 3" in ok(nested("sessions", "learn", session, str(file)))
    kinds = [one["kind"] for one in json.loads(ok(nested("sessions", "history", session, "--json")))]
    assert kinds == ["learn", "learn", "turn"]
    assert json.loads(ok(nested("sessions", "learn", session, "-", "--json", input="one more")))["version"] == 4
    assert "no text" in refused(nested("sessions", "learn", session, "-", input=" \n\n"), 2)
    file.write_bytes(b"caf\xe9")
    assert "byte 3" in refused(nested("sessions", "learn", session, str(file)), 2)


def test_progress_is_for_terminals(nested: Nested, url: str, session: str, tmp_path: Path) -> None:
    """A bar on a terminal's stderr; nothing in a pipe, nothing with --json."""
    file = tmp_path / "notes.txt"
    file.write_text("\n\n".join(f"Room {n} is empty." for n in range(3)))
    assert nested("sessions", "learn", session, str(file)).stderr == ""
    main, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 80))
    command = [NESTED, "sessions", "learn", session, str(file)]
    env = environment(NESTED_BASE_URL=url, TERM="xterm")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, env=env) as process:
        os.close(child)
        try:
            assert "learn" in read_until(main, "/3")
            assert b"learned 3 paragraphs" in process.communicate(timeout=60)[0]
        finally:
            process.kill()
            os.close(main)


def test_help_of_every_command() -> None:
    for command in ([], ["chat"], ["sessions"], ["sessions", "restore"], ["doctor"]):
        done = subprocess.run([NESTED, *command, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: nested")
