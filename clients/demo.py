"""`make demo`: teach six facts, kill the server with SIGKILL, start it again, ask.

The questions travel alone, without the conversation, so what is answered right comes from the session's memory. A
control session that was taught nothing gets the same questions. Exit status 0: at least 5 right, control at most 1.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

__all__ = ["FACTS", "Fact", "main"]

START_SECONDS = 120.0


@dataclass(frozen=True)
class Fact:
    """What is told, what is asked later, and the word a right answer holds."""

    told: str
    asked: str
    value: str


FACTS = (
    Fact("My dog is called Rex.", "What is my dog called?", "Rex"),
    Fact("I live in Lisbon.", "Where do I live?", "Lisbon"),
    Fact("I work as a carpenter.", "What is my job?", "carpenter"),
    Fact("My favorite food is mushroom soup.", "What is my favorite food?", "mushroom"),
    Fact("My sister's name is Nora.", "What is my sister's name?", "Nora"),
    Fact("I put the spare key under the flower pot.", "Where did I put the spare key?", "flower pot"),
)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Server:
    """A real `nested-serve` process on a loopback port."""

    def __init__(self, port: int, folder: Path, options: Sequence[str]) -> None:
        program = Path(sys.executable).with_name("nested-serve")
        if not program.exists():
            raise DemoError(f"{program} is missing; `make demo` installs it, or: pip install -e '.[serve,demo]'")
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        self._command = [str(program), "--port", str(port), "--data-dir", str(folder / "data"), *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # noqa: S603 - our own program
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise DemoError(f"the server ended with status {self._process.returncode}:\n{self._tail()}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=2.0).is_success:
                    return
            time.sleep(0.2)
        raise DemoError(f"no answer from {self.url}/health within {START_SECONDS:.0f} s:\n{self._tail()}")

    def kill(self) -> None:
        """SIGKILL: no goodbye, nothing flushed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


class Speaker:
    """One session, spoken to through the `openai` client, one message per request."""

    def __init__(self, url: str, session: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", default_headers={"X-Session-ID": session}, max_retries=0
        )
        self._model = self._client.models.list().data[0].id

    def say(self, message: str) -> str:
        """Send only this message; return the reply."""
        completion = self._client.chat.completions.create(
            model=self._model, messages=[{"role": "user", "content": message}], temperature=0, max_tokens=48
        )
        reply = (completion.choices[0].message.content or "").strip()
        print(f"  you    {message}\n  model  {reply}")
        return reply


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description="Teach, SIGKILL, restart, ask.")
    parser.add_argument("serve_options", nargs="*", metavar="OPTION", help="passed to nested-serve, after --")
    options = parser.parse_args(argv).serve_options
    try:
        with _server(options) as server:
            right, control = _story(server)
    except (DemoError, openai.OpenAIError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nafter the restart: {right} of {len(FACTS)} right; control, taught nothing: {control} of {len(FACTS)}")
    return 0 if right >= 5 and control <= 1 else 1


@contextlib.contextmanager
def _server(options: Sequence[str]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="nested-demo-") as folder:
        server = Server(_free_port(), Path(folder), options)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def _story(server: Server) -> tuple[int, int]:
    print("Teaching the session 'demo', one request per fact:")
    teacher = Speaker(server.url, "demo")
    for fact in FACTS:
        teacher.say(fact.told)
    print("\nSIGKILL; starting the server again.\n")
    server.kill()
    server.start()
    print("Asking 'demo', one request per question:")
    right = _ask(Speaker(server.url, "demo"))
    print("\nAsking 'control', which was taught nothing:")
    return right, _ask(Speaker(server.url, "control"))


def _ask(speaker: Speaker) -> int:
    return sum(fact.value.lower() in speaker.say(fact.asked).lower() for fact in FACTS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
