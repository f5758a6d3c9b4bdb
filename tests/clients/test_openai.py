"""The `openai` package through `clients.python.openai`: bound to a session, and repeated attempts are one turn."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

import clients.python as nested
from clients.python import AsyncClient, Client, ConfigError

ASK: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
HELLO = [{"role": "user", "content": "My dog is called Rex."}]
NewId = Callable[[], str]
Opened = Callable[..., Any]


@pytest.fixture
def run() -> Iterator[Callable[[Any], Any]]:
    """The result of a call, awaited where it must be."""
    with asyncio.Runner() as runner:
        yield lambda value: runner.run(_wait(value)) if inspect.isawaitable(value) else value


async def _wait(value: Any) -> Any:
    return await value


@pytest.fixture
def open_ai(kind: str, run: Callable[[Any], Any]) -> Iterator[Opened]:
    """`nested.openai`, or its twin."""
    opened: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        opened.append((nested.openai if kind == "blocking" else nested.async_openai)(*args, **options))
        return opened[-1]

    yield make
    for ai in opened:
        run(ai.close())


def test_it_is_bound_to_the_session(open_ai: Opened, run: Any, url: str, new_id: NewId) -> None:
    name = new_id()
    ai = open_ai(session=name, base_url=url)
    first = run(ai.chat.completions.create(messages=HELLO, **ASK))
    later = run(ai.with_options(timeout=30).chat.completions.create(messages=HELLO, **ASK))
    assert [answer.model_extra["session"]["version"] for answer in (first, later)] == [1, 2]
    with Client(url) as client:
        assert client.session(name).info().version == 2
    nobody = run(open_ai(base_url=url).chat.completions.create(messages=HELLO, **ASK))
    assert "session" not in nobody.model_extra


def test_streams(open_ai: Opened, run: Any, url: str, new_id: NewId) -> None:
    ai = open_ai(session=new_id(), base_url=url)
    whole = run(open_ai(base_url=url).chat.completions.create(messages=HELLO, **ASK)).choices[0].message.content

    async def read(stream: Any) -> list[Any]:
        return [chunk async for chunk in stream]

    stream = run(ai.chat.completions.create(messages=HELLO, stream=True, **ASK))
    chunks = run(read(stream)) if hasattr(stream, "__aiter__") else list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


def test_settings_come_from_the_environment(open_ai: Opened, run: Any, url: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("NESTED_BASE_URL", url)
    monkeypatch.setenv("NESTED_API_KEY", "key-of-mine")
    ai = open_ai("alice")
    assert (str(ai.base_url), ai.api_key) == (f"{url}/v1/", "key-of-mine")
    assert run(ai.models.list()).data[0].id == "tiny"


@pytest.mark.parametrize("id", ["Zoë", "two words", ""])
def test_an_id_that_no_header_holds_is_refused(open_ai: Opened, id: str) -> None:
    with pytest.raises(ConfigError):
        open_ai(session=id)


class Dropping(ThreadingHTTPServer):
    """A proxy that lets the server answer each turn, and hangs up instead of passing the first answer on."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Dropping

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.append(self.headers["Idempotency-Key"])
        sent = {name: value for name, value in self.headers.items() if name.lower() != "x-stainless-retry-count"}
        answer = httpx.post(self.server.upstream + self.path, content=body, headers=sent, timeout=60)
        if len(self.server.keys) > 1:
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["content-type"])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def dropping(url: str) -> Iterator[Dropping]:
    with Dropping(url) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_lost_on_the_way_is_one_turn(
    open_ai: Opened, run: Any, dropping: Dropping, url: str, new_id: NewId, stream: bool
) -> None:
    """The client's count of its own retries does not reach the server here: only the key can tell."""
    name = new_id()
    ai = open_ai(session=name, base_url=dropping.url)
    answer = run(ai.chat.completions.create(messages=HELLO, stream=stream, **ASK))
    if stream:
        run(answer.close())
    assert len(dropping.keys) == 2
    assert dropping.keys[0] == dropping.keys[1] is not None
    run(ai.chat.completions.create(messages=HELLO, **ASK))  # said again on purpose
    assert dropping.keys[2] != dropping.keys[0]
    with Client(url) as client:
        assert client.session(name).info().version == 2


def test_an_answer_lost_on_the_way_is_one_turn_of_the_sdk(
    kind: str, dropping: Dropping, url: str, new_id: NewId
) -> None:
    name = new_id()
    if kind == "blocking":
        with Client(dropping.url, model="tiny") as client:
            reply = client.session(name).chat("hello", temperature=0, max_tokens=8)
    else:

        async def turn() -> Any:
            async with AsyncClient(dropping.url, model="tiny") as client:
                return await client.session(name).chat("hello", temperature=0, max_tokens=8)

        reply = asyncio.run(turn())
    assert dropping.keys[0] == dropping.keys[1] is not None
    with Client(url) as client:
        assert client.session(name).info().digest == reply.session.digest
        assert reply.session.version == 1


def test_without_the_package_it_says_what_to_do() -> None:
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "import clients.python as nested\n"
        "try: nested.openai(session='alice')\n"
        "except nested.ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install openai" in done.stdout
