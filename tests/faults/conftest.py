"""Real servers, real Redis, and ways to hurt them.

NESTED_FAULT_POINTS scales the tests: 100 is what `make test-faults` runs, 5 what `make test` does.
NESTED_FAULT_EXEC=1 starts every server as a fresh `nested-serve` instead of forking one that has imported everything.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from nested_runtime.models.hope import Hope
from nested_runtime.models.loading import build, save_model
from nested_runtime.tokenizer import SPECIAL, Tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POINTS = int(os.environ.get("NESTED_FAULT_POINTS", "5"))
START_SECONDS = 120.0
ADMIN = {"Authorization": "Bearer key-of-the-admin"}


@pytest.fixture(scope="session")
def scaled() -> Callable[[int], int]:
    """Of a number in the full test, the part this run does."""
    return lambda full: max(1, full * POINTS // 100)


def write_model(folder: Path, seed: int, name: str, **sizes: int) -> Path:
    """A random model over bytes that prefers letters and whose greedy text differs from prompt to prompt."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    model = build("hope", {**Hope.TINY, "vocab_size": len(vocab), **sizes})
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.embed[[vocab[letter] for letter in "abcdefghijklmnopqrstuvwxyz,."]] *= 20
    save_model(folder, "hope", model, Tokenizer(backend), name, torch.float32)
    return folder


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., Path]:
    return write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", 1, "tiny")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "other", 2, "other")


class Server:
    """One `nested-serve` process after another, with the same options."""

    def __init__(self, launch: Callable[..., int], folder: Path, options: tuple[str, ...], env: dict[str, str]) -> None:
        self._launch, self._folder, self._options, self._env = launch, folder, options, env
        self._log = folder / "log"
        self._pidfd = -1
        self.pid = 0
        self.url = ""

    def start(self) -> Server:
        """Start it and wait until it listens."""
        self._log.unlink(missing_ok=True)
        self.pid = self._launch(self._options, self._env, self._log)
        self._pidfd = os.pidfd_open(self.pid)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not self.is_over():
            if self._log.exists() and (found := re.search(r" on (http://\S+),", self._log.read_text())):
                self.url = found[1]
                return self
            time.sleep(0.01)
        raise AssertionError(f"nested-serve did not start:\n{self.log()}")

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 60.0, **options})

    def send(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def is_over(self, wait: float = 0.0) -> bool:
        return bool(select.select([self._pidfd], [], [], wait)[0])

    def stop(self, number: int = signal.SIGKILL, wait: float = 60.0) -> None:
        """Send a signal and wait for the end."""
        if self._pidfd < 0:
            return
        if not self.is_over():
            self.send(signal.SIGCONT)
            self.send(number)
        assert self.is_over(wait), f"nested-serve {self.pid} goes on after signal {number}"
        os.close(self._pidfd)
        self._pidfd = -1

    def rss(self) -> int:
        """Resident memory in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Start a server process; its pid."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if os.environ.get("NESTED_FAULT_EXEC"):
        children: list[subprocess.Popen[bytes]] = []

        def execute(options: tuple[str, ...], env: dict[str, str], log: Path) -> int:
            command = [sys.executable, "-m", "server", *options]
            with log.open("wb") as file:
                children.append(subprocess.Popen(command, stderr=file, env={**environment, **env}))
            threading.Thread(target=children[-1].wait, daemon=True).start()
            return children[-1].pid

        yield execute
        return
    pipe = subprocess.PIPE
    zygote = subprocess.Popen(
        [sys.executable, str(HERE / "zygote.py")], stdin=pipe, stdout=pipe, env=environment, text=True, cwd=ROOT
    )
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    stdin, stdout = zygote.stdin, zygote.stdout
    assert stdout.readline() == "ready\n"

    def fork(options: tuple[str, ...], env: dict[str, str], log: Path) -> int:
        print(json.dumps({"arguments": options, "environment": env, "log": str(log)}), file=stdin, flush=True)
        return int(stdout.readline())

    yield fork
    zygote.kill()
    zygote.wait()
    stdin.close()
    stdout.close()


Serve = Callable[..., Server]


@pytest.fixture
def serve(launch: Callable[..., int], model_folder: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start a server on a store; keyword arguments in capitals are NESTED_ settings."""
    made: list[Server] = []
    admin = tmp_path / "admin-keys"
    admin.write_text(ADMIN["Authorization"].split()[1])

    def start(store: str, *options: str, model: Path = model_folder, **settings: object) -> Server:
        folder = tmp_path / f"server-{len(made)}"
        folder.mkdir()
        fixed = ("--model", str(model), "--port", "0", "--threads", "1", "--slots", "8", "--max-context", "4096")
        environment = {f"NESTED_{name}": str(value) for name, value in settings.items()}
        command = (*fixed, "--store", store, "--admin-key-file", str(admin), "--drain-seconds", "2", *options)
        made.append(Server(launch, folder, command, environment))
        return made[-1].start()

    yield start
    for server in made:
        server.stop()


class Redis:
    """A redis-server process of our own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        command = ["redis-server", *where, *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while self.send("PING") != b"+PONG\r\n":
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

    def send(self, command: str) -> bytes:
        """The raw reply to an inline command, empty when nobody answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(command.encode() + b"\r\n")
                return connection.recv(1 << 16)
        except OSError:
            return b""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Callable[..., Redis]]:
    """Start a Redis whose commits are on disk when they return, or with other options."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    made: list[Redis] = []

    def start(fsync: str = "always") -> Redis:
        folder = tmp_path / f"redis-{len(made)}"
        folder.mkdir()
        made.append(Redis(folder, "--appendonly", "yes", "--appendfsync", fsync))
        return made[-1]

    yield start
    for server in made:
        server.kill()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A durable store that several servers can share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/sessions.db"
    url: str = request.getfixturevalue("redis")().url
    return url


def ask(http: httpx.Client, text: str, session: str | None = None, **fields: Any) -> httpx.Response:
    """One greedy turn of 8 tokens."""
    headers, timeout = fields.pop("headers", {}), fields.pop("timeout", 60.0)
    messages = [{"role": "user", "content": text}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, "logit_bias": {"4": -100}}
    if session is not None:
        headers = {"X-Session-ID": session, **headers}
    return http.post("/v1/chat/completions", json={**body, **fields}, headers=headers, timeout=timeout)


@pytest.fixture(scope="session")
def turn() -> Callable[..., httpx.Response]:
    return ask


@pytest.fixture(scope="session")
def settled() -> Callable[..., dict[str, Any]]:
    """A session's info, absent = version 0, asked for until the store answers."""

    def info(http: httpx.Client, session: str, within: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + within
        while True:
            reply = http.get(f"/v1/sessions/{session}")
            if reply.status_code == 404:
                return {"version": 0, "digest": ""}
            if reply.status_code == 200:
                found: dict[str, Any] = reply.json()
                return found
            assert reply.status_code == 503, reply.text
            assert time.monotonic() < deadline, reply.text
            time.sleep(0.05)

    return info


Alone = Callable[[list[str]], list[tuple[str, str]]]


@pytest.fixture
def alone(serve: Serve) -> Alone:
    """(text, digest) after every turn of an undisturbed session with these messages."""
    quiet: list[Server] = []

    def run(messages: list[str]) -> list[tuple[str, str]]:
        if not quiet:
            quiet.append(serve("memory:"))
        with quiet[0].client() as http:
            session, found = f"alone-{time.monotonic_ns()}", []
            for message in messages:
                body = ask(http, message, session).json()
                found.append((body["choices"][0]["message"]["content"], body["session"]["digest"]))
            return found

    return run


@pytest.fixture(scope="session")
def healthy() -> Callable[[Server], None]:
    """Every checksum, index and slot of a server and its store is in order."""

    def check(server: Server) -> None:
        with server.client(timeout=300.0) as http:
            reply = http.post("/admin/fsck", headers=ADMIN)
            assert reply.json() == {"healthy": True, "problems": []}, reply.text

    return check


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that run side by side."""
    with ThreadPoolExecutor(32) as threads:
        yield threads
