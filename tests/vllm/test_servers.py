"""nested-serve on vLLM and nested-serve on our engine, one store: a client cannot tell which of the two it talks to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load

START_SECONDS = 300.0
MESSAGES = ("My dog is called Rex.", "I live in Lisbon.", "What is my dog called?", "Where do I live?")
Serve = Callable[..., str]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start nested-serve with a backend on a store; its URL."""
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment (make test-vllm makes one)")
    folder, running = tmp_path_factory.mktemp("servers"), []

    def start(backend: str, store: str) -> str:
        log = folder / f"log-{len(running)}"
        options = ["--backend", backend, "--store", store, "--port", "0", "--slots", "4", "--max-context", "1024"]
        with log.open("wb") as file:
            process = subprocess.Popen([sys.executable, "-m", "server", *options], stderr=file, env=dict(os.environ))
        running.append(process)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if found := re.search(r" on (http://\S+),", log.read_text()):
                return found[1]
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        assert process.wait(60) == 0


def say(url: str, session: str | None, text: str, **fields: Any) -> dict[str, Any]:
    headers = {} if session is None else {"X-Session-ID": session}
    body = {"model": "hope-nano", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16}
    reply = httpx.post(f"{url}/v1/chat/completions", json={**body, **fields}, headers=headers, timeout=120)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def text(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


@pytest.mark.timeout(600)
def test_a_session_goes_from_engine_to_engine(serve: Serve, tmp_path: Path) -> None:
    """Turn by turn in another process with another engine: the transcript and the memory of our engine alone."""
    store = f"sqlite:///{tmp_path}/sessions.db"
    ours, theirs = serve("native", store), serve("vllm", store)
    for number, message in enumerate(MESSAGES):
        expected = say(ours, "alone", message)
        for session, url in (("handed over", (theirs, ours)[number % 2]), ("on vLLM", theirs)):
            found = say(url, session, message)
            assert text(found) == text(expected), (session, number)
            assert found["usage"] == expected["usage"]
            assert found["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
            for field in ("version", "learned_tokens"):
                assert found["session"][field] == expected["session"][field]
    alone, handed, on_vllm = (
        load(httpx.get(f"{ours}/v1/sessions/{name}/export").content) for name in ("alone", "handed over", "on vLLM")
    )
    for name, tensor in alone.items():
        for other in (handed, on_vllm):
            assert (other[name] - tensor).abs().max() < 1e-4, name
    forgetful = [text(say(theirs, None, message)) for message in MESSAGES[2:]]
    remembering = [text(say(theirs, "on vLLM", message)) for message in MESSAGES[2:]]
    assert forgetful != remembering, "the answers do not depend on the memory"
    stopped = {"stop": ["called"], "max_tokens": 24}
    assert text(say(theirs, None, MESSAGES[0], **stopped)) == text(say(ours, None, MESSAGES[0], **stopped))
    assert httpx.get(f"{theirs}/ready").status_code == 200
