"""A real `nested-serve` with two tiny models behind an API key, and the programs of clients nobody here wrote.

Each client lives in a virtual environment of its own, `.venv-compat/<client>`, made by `make test-compat` from
`requirements/<client>.txt`. A client that is not installed is skipped, visibly.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from nested_runtime.models.hope import Hope
from nested_runtime.models.loading import build, save_model
from nested_runtime.tokenizer import END, SPECIAL, Tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLIENTS = ROOT / ".venv-compat"
KEY, ADMIN_KEY = "key-of-the-compat-tests", "admin-key-of-the-compat-tests"
START_SECONDS = 240.0  # torch alone takes long to import on a busy machine
PROGRAM_SECONDS = 280.0
IS_FULL = os.environ.get("NESTED_COMPAT") == "1"


@pytest.fixture(scope="session")
def is_full() -> bool:
    """Whether this is `make test-compat`, rather than the short form in `make test`."""
    return IS_FULL


def write_model(folder: Path, seed: int, name: str) -> Path:
    """A random model over bytes that prefers letters and seldom ends a reply."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    model = build("hope", {**Hope.TINY, "vocab_size": len(vocab)})
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.embed[[vocab[letter] for letter in "abcdefghijklmnopqrstuvwxyz,."]] *= 20
        model.embed[vocab[END]] = 0.0
    save_model(folder, "hope", model, Tokenizer(backend), name, torch.float32)
    return folder


@dataclass
class Server:
    """A `nested-serve` process."""

    url: str
    pid: int
    log: Path

    def client(self, key: str | None = KEY, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, **{"timeout": 120.0, **options})

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, **options})

    def gauge(self, name: str, model: str = "tiny") -> float:
        """A metric as Prometheus would read it."""
        with self.client() as client:
            found = re.search(rf'^nested_{name}{{model="{model}"}} (\S+)$', client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


@contextmanager
def served(folder: Path, models: Sequence[Path], *options: str) -> Iterator[Server]:
    """Run `nested-serve` on a free port, with an API key and an admin key, on SQLite."""
    keys, admin, log = folder / "keys", folder / "admin", folder / "log"
    keys.write_text(f"tester {KEY}\n")
    admin.write_text(f"{ADMIN_KEY}\n")
    command = [sys.executable, "-m", "server", "--port", "0", "--threads", "1", "--slots", "8", "--max-context", "2048"]
    command += ["--data-dir", str(folder), "--api-key-file", str(keys), "--admin-key-file", str(admin)]
    command += ["--drain-seconds", "2", *options]
    for model in models:
        command += ["--model", str(model)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + START_SECONDS
        found = None
        while found is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "nested-serve did not start"
            time.sleep(0.05)
            found = re.search(r" on (https?://\S+),", log.read_text())
        yield Server(found[1], process.pid, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / name, seed, name) for seed, name in ((1, "tiny"), (2, "other"))]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_folders: list[Path]) -> Iterator[Server]:
    """One server for all that need nothing special; each test uses session ids of its own."""
    with served(tmp_path_factory.mktemp("server"), model_folders) as running:
        yield running


@pytest.fixture
def serve(tmp_path: Path, model_folders: list[Path]) -> Callable[..., Any]:
    """Start another server with more options."""
    return lambda *options: served(tmp_path, model_folders[:1], *options)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as http:
        yield http


@pytest.fixture
def ai(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def installed(client: str, program: str = "python") -> Path:
    """A program of a client's environment; skips the test when it is not there."""
    path = CLIENTS / client / "bin" / program
    if not (CLIENTS / client / ".installed").exists() or not path.exists():
        pytest.skip(f"{client} is not installed; `make test-compat` installs it")
    return path


Run = Callable[..., str]


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Run:
    """Run a program with the server's address in its environment; its standard output."""

    def start(*command: str | Path, timeout: float = PROGRAM_SECONDS, **environment: str) -> str:
        known = {"BASE_URL": f"{server.url}/v1", "API_KEY": KEY, "MODEL": "tiny", "HOME": str(tmp_path)}
        quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "NO_COLOR": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        made = subprocess.run(
            [str(part) for part in command],
            env={"PATH": os.environ["PATH"], **quiet, **known, **environment},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert made.returncode == 0, (
            f"{command} ended with {made.returncode}:\n{made.stdout[-2000:]}{made.stderr[-6000:]}"
        )
        return made.stdout

    return start


TURNS = ("my name is Ada", "who am I?", "and where?")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@dataclass(frozen=True)
class Reference:
    """What plain HTTP gets for `TURNS`, one new message a turn."""

    replies: list[str]
    digest: str
    memoryless: list[str]


@pytest.fixture(scope="session")
def reference(server: Server) -> Reference:
    """The conversation every client must have: same replies, same memory."""
    replies, alone, digest = [], [], ""
    with server.client() as http:
        for turn in TURNS:
            body = {"model": "tiny", "messages": [{"role": "user", "content": turn}], **GREEDY}
            alone.append(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])
            reply = http.post("/v1/chat/completions", json=body, headers={"X-Session-ID": "reference"}).json()
            replies.append(reply["choices"][0]["message"]["content"])
            digest = reply["session"]["digest"]
    assert replies[0] == alone[0]
    assert replies[1:] != alone[1:], "the memory changes nothing: the tests below would show nothing"
    return Reference(replies, digest, alone)


@pytest.fixture
def had_the_conversation(client: httpx.Client, reference: Reference) -> Callable[[str, str], None]:
    """Check a program's JSON list of replies, and the memory it left."""

    def check(output: str, session: str) -> None:
        assert json.loads(output.strip().splitlines()[-1]) == reference.replies
        info = client.get(f"/v1/sessions/{session}").json()
        assert info["version"] == len(TURNS)
        assert info["digest"] == reference.digest

    return check
