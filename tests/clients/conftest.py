"""A real `nested-serve` with a tiny model of random weights, and both clients behind one way to call them."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from clients.python import AsyncClient, Client, Reply
from nested_runtime.models.hope import Hope
from nested_runtime.models.loading import save_model
from nested_runtime.tokenizer import SPECIAL, Tokenizer

BIN = Path(sys.executable).parent
START_SECONDS = 280.0  # torch alone takes long to import on a busy machine


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and the special ones."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([], trainer)
    return Tokenizer(backend)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights: it talks nonsense, with a memory."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    model = Hope.from_config({**Hope.TINY, "vocab_size": tokenizer.vocab_size})
    with torch.no_grad():
        for parameter in model.parameters():  # fresh output projections are zero
            parameter.add_(0.3 * torch.randn(parameter.shape))
        model.embed[tokenizer.end_id] = 0.0  # rarely the likeliest: replies have some length
    save_model(folder, "hope", model, tokenizer, name="tiny")
    return folder


Start = Callable[..., str]


@pytest.fixture(scope="session")
def start_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers on free loopback ports; gives the base URL."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> str:
        folder = tmp_path_factory.mktemp("server")
        log = folder / "log"
        command = [str(BIN / "nested-serve"), "--model", str(model_folder), "--port", "0", "--data-dir", str(folder)]
        with log.open("wb") as file:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=env)
        processes.append(process)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if found := re.search(r"on (http://127\.0\.0\.1:\d+)", log.read_text()):
                return found[1]
            assert process.poll() is None, f"nested-serve ended with {process.returncode}:\n{log.read_text()}"
            time.sleep(0.1)
        raise AssertionError(f"nested-serve did not start within {START_SECONDS} s:\n{log.read_text()}")

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def url(start_server: Start) -> str:
    """A server without API keys."""
    return start_server()


class Caller:
    """Calls a client the same way whether it blocks or is awaited."""

    def __init__(self, kind: str, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner() if kind == "async" else None
        self.client: Any = AsyncClient(*args, **kwargs) if self._runner else Client(*args, **kwargs)

    def __call__(self, value: Any) -> Any:
        """The result of an operation."""
        if self._runner is None:
            assert not inspect.isawaitable(value)
            return value
        return self._runner.run(value)

    def read(self, stream: Any, at_most: int | None = None) -> tuple[list[str], Reply | None]:
        """The pieces of a stream and its reply; leave it after `at_most` pieces, then there is no reply."""
        if self._runner is not None:
            return self._runner.run(self._read(stream, at_most))
        pieces: list[str] = []
        with stream:
            for piece in stream:
                pieces.append(piece)
                if len(pieces) == at_most:
                    return pieces, None
        return pieces, stream.reply

    async def _read(self, stream: Any, at_most: int | None) -> tuple[list[str], Reply | None]:
        pieces: list[str] = []
        async with stream:
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) == at_most:
                    return pieces, None
        return pieces, stream.reply

    def close(self) -> None:
        self(self.client.close())
        if self._runner is not None:
            self._runner.close()


@pytest.fixture(params=["blocking", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two clients."""
    name: str = request.param
    return name


@pytest.fixture
def connect(kind: str) -> Iterator[Callable[..., Caller]]:
    """Makes clients of this kind."""
    callers: list[Caller] = []

    def make(*args: Any, **kwargs: Any) -> Caller:
        callers.append(Caller(kind, *args, **kwargs))
        return callers[-1]

    yield make
    for caller in callers:
        caller.close()


@pytest.fixture
def call(connect: Callable[..., Caller], url: str) -> Caller:
    """A client of the server."""
    return connect(url)


@pytest.fixture
def new_id() -> Callable[[], str]:
    """Session ids that no other test uses."""
    return lambda: f"s_{uuid.uuid4().hex[:12]}"
