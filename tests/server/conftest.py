"""A tiny random HOPE model on disk, and real servers: uvicorn on a free loopback port, in a thread or as a process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from nested_runtime.config import EngineConfig, SessionConfig
from nested_runtime.models.hope import Hope
from nested_runtime.models.loading import build, save_model
from nested_runtime.tokenizer import SPECIAL, Tokenizer
from server.__main__ import listening
from server.app import create_app, running
from server.assembly import assemble
from server.deps import Service
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def write_model(folder: Path, seed: int = 1, name: str = "tiny", **fields: Any) -> Path:
    """A random model over bytes that prefers letters and whose greedy text differs from prompt to prompt."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    model = build("hope", {**Hope.TINY, "vocab_size": len(vocab), **fields})
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        letters = [vocab[letter] for letter in "abcdefghijklmnopqrstuvwxyz ,." if letter in vocab]
        model.embed[letters] *= 20
    save_model(folder, "hope", model, Tokenizer(backend), name, torch.float32)
    return folder


@dataclass
class Running:
    """A server in this process."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop
    app: FastAPI

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120.0, **kwargs)

    def wait_until_running(self, turns: int = 1) -> None:
        """Until so many turns are in the engine."""
        deadline = time.monotonic() + 60
        while self.service.runtime.models["tiny"].backend.stats()["running"] < turns:
            assert time.monotonic() < deadline, f"{turns} turns did not come into the engine, or were over too soon"
            time.sleep(0.005)

    def run(self, coroutine: Any) -> Any:
        """Run something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


@contextmanager
def served(settings: Settings) -> Iterator[Running]:
    """The real app under the real uvicorn, in a thread."""
    service = assemble(settings)
    started: list[Running] = []
    app = create_app(service)
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)

    async def main() -> None:
        with listening(settings) as listener:
            await run_on(listener)

    async def run_on(listener: socket.socket) -> None:
        async with running(service):
            url = "http://nested" if settings.uds else f"http://127.0.0.1:{listener.getsockname()[1]}"
            started.append(Running(url, service, asyncio.get_running_loop(), app))
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    deadline = time.monotonic() + 180
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert server.started
        yield started[0]
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "other", seed=2, name="other")


@pytest.fixture(scope="session")
def leveled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two levels that learn while it is served."""
    levels = [{"chunk": 8, "hidden": 8, "rate": 0.05}, {"chunk": 16, "hidden": 8, "rank": 2, "optimizer": "momentum"}]
    return write_model(tmp_path_factory.mktemp("model") / "leveled", levels=levels, recent=32)


@pytest.fixture(scope="session")
def settings(model_folder: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        engine = {"slots": 8, "max_context": 2048, "threads": 1} | changes.pop("engine", {})
        sessions = {"wait_seconds": 5.0} | changes.pop("sessions", {})
        fields = {"models": (str(model_folder),), "store": "memory:", "port": 0, "drain_seconds": 2.0} | changes
        return Settings(engine=EngineConfig(**engine), sessions=SessionConfig(**sessions), **fields)

    return make


@pytest.fixture(scope="session")
def server(settings: Callable[..., Settings]) -> Iterator[Running]:
    """One server for all tests that need nothing special; each uses session ids of its own."""
    with served(settings()) as running_server:
        yield running_server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as http:
        yield http


@pytest.fixture(scope="session")
def serve() -> Callable[[Settings], Any]:
    return served


def _chat(http: httpx.Client, *messages: str | dict[str, str], session: str | None = None, **fields: Any) -> Any:
    headers = fields.pop("headers", {})
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages],
        "max_tokens": 8,
        "temperature": 0,
        "logit_bias": {"4": -100},
        **fields,
    }
    if session is not None:
        headers = {"X-Session-ID": session, **headers}
    return http.post("/v1/chat/completions", json=body, headers=headers)


@pytest.fixture(scope="session")
def chat() -> Callable[..., httpx.Response]:
    """One greedy turn of 8 tokens."""
    return _chat


class Process:
    """A real `nested-serve` process on a free port, which it names in its log."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> Process:
        command = [sys.executable, "-m", "server", "--port", "0", "--threads", "1", *self._arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stderr=log, env=environment)
        deadline = time.monotonic() + 120  # torch alone takes long to import on a busy machine
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r" on (\S+),", self._log.read_text())
            if found:
                self.url = found[1]
                return self
            time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120.0, **kwargs)

    def log(self) -> str:
        return self._log.read_text()

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        """The exit status."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self, number: int = signal.SIGKILL) -> int:
        self.send(number)
        return self.wait()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(*arguments: str) -> Process:
        made.append(Process(tmp_path / f"server-{len(made)}.log", *arguments).start())
        return made[-1]

    yield start
    for one in made:
        if one._process is not None and one._process.poll() is None:
            one.stop()
