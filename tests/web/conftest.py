"""A real `nested-serve` with hope-nano, and a real Chromium that looks at its page.

`make test-web` puts Playwright and axe-core into `.venv-web`; Chromium is Debian's. What is missing is a visible skip.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "nested_runtime" / "checkpoints" / "hope-nano"
AXE = ROOT / ".venv-web" / "node" / "node_modules" / "axe-core" / "axe.min.js"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
MILLISECONDS = 240_000  # a bound for a machine that does much else
ADMIN_KEY = "admin-key-of-the-web-tests"
HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=2</script>'


class Server:
    """A `nested-serve` process that can be killed and started again on the same port with the same store."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        admin = folder / "admin-key"
        admin.write_text(ADMIN_KEY)
        store = f"sqlite:///{folder / 'sessions.db'}"
        self._command = [sys.executable, "-m", "server", "--port", str(self.port), "--threads", "1", "--store", store]
        self._command += ["--admin-key-file", str(admin), *options]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(self._command, cwd=ROOT, stderr=log, env=environment)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(self._log.read_text())

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120.0, **options)


def renamed(folder: Path, name: str) -> Path:
    """hope-nano under another name."""
    folder.mkdir()
    for path in NANO.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((NANO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "name": name}))
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not kill it; each uses session ids of its own."""
    folder = tmp_path_factory.mktemp("web")
    hostile = renamed(folder / "hostile", HOSTILE)
    made = Server(folder, "--model", "hope-nano", "--model", str(hostile))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(*options: str) -> Server:
        made.append(Server(tmp_path, *options))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.kill()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make test-web installs it")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium program (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        launched.close()


@dataclass
class Visit:
    """One tab on a server's page, and everything it should not have done."""

    page: Any
    url: str
    foreign: list[str] = field(default_factory=list)  # requests to other hosts
    errors: list[str] = field(default_factory=list)  # exceptions in scripts, and refusals of the policy

    def open(self, session: str | None = None, view: str = "chat") -> Visit:
        """Show the page with a session chosen as a person would."""
        self.page.goto(f"{self.url}/" if view == "chat" else f"{self.url}/#show-{view}")
        self.page.locator("#model option").first.wait_for(state="attached")
        if session is not None:
            self.choose(session)
        return self

    def choose(self, session: str) -> None:
        self.press("New…")
        self.answer(session)
        self.page.wait_for_function("id => document.getElementById('session').value === id", arg=session)

    def press(self, name: str, **options: Any) -> None:
        self.page.get_by_role("button", name=name, exact=True, **options).first.click()

    def answer(self, text: str) -> None:
        """Fill the dialog and agree."""
        dialog = self.page.locator("#dialog")
        if dialog.locator("#dialog-input").is_visible():
            dialog.locator("#dialog-input").fill(text)
        dialog.locator("#dialog-ok").click()
        dialog.wait_for(state="hidden")

    def say(self, text: str, mode: str = "chat") -> str:
        """Send a message and wait; the reply's text."""
        before = self.page.locator("#log > li").count()
        self.page.select_option("#mode", mode)
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        self.settled(before)
        return self.reply()

    def settled(self, before: int) -> None:
        """Wait until the turn is over, however it ended."""
        self.page.wait_for_function(
            "n => (document.querySelectorAll('#log > li').length > n || !document.getElementById('notice').hidden)"
            " && document.getElementById('stop').hidden",
            arg=before,
        )

    def reply(self) -> str:
        return self.page.locator("#log > li").last.locator(".text, .tokens").first.inner_text()

    def version(self) -> int:
        """The version the inspector shows."""
        return int(self.fact("Version"))

    def fact(self, term: str) -> str:
        place = self.page.locator("#inspector > dl").locator("div", has=self.page.locator("dt", has_text=term))
        return place.locator("dd").first.text_content()

    def wait_for_version(self, number: int) -> None:
        self.page.wait_for_function(
            "n => [...document.querySelectorAll('#inspector > dl div')]"
            ".some(d => d.firstChild.textContent === 'Version' && d.lastChild.textContent === n)",
            arg=str(number),
        )

    def notice(self) -> str:
        self.page.locator("#notice").wait_for(state="visible")
        return self.page.locator("#notice").inner_text()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[..., Visit]]:
    """Opens tabs. At the end none may have asked another host, thrown an error, or met the policy."""
    contexts: list[Any] = []
    visits: list[Visit] = []

    def watch(page: Any, url: str) -> Visit:
        made = Visit(page, url)
        page.set_default_timeout(MILLISECONDS)
        page.on("request", lambda r: r.url.startswith((url, "blob:")) or made.foreign.append(r.url))
        page.on("pageerror", lambda error: made.errors.append(str(error)))
        page.on("console", lambda m: "Content Security Policy" in m.text and made.errors.append(m.text))
        visits.append(made)
        return made

    def open_tab(at: Server | None = None, beside: Visit | None = None, **options: Any) -> Visit:
        if beside is not None:
            return watch(beside.page.context.new_page(), beside.url)
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        return watch(contexts[-1].new_page(), (at or server).url)

    yield open_tab
    for context in contexts:
        context.close()
    assert not [url for one in visits for url in one.foreign]
    assert not [error for one in visits for error in one.errors]


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: make test-web installs it with npm")
    return AXE.read_text(encoding="utf-8")


@pytest.fixture
def new_id(request: pytest.FixtureRequest) -> str:
    """A session id of the test's own."""
    return request.node.name[:60]


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE
