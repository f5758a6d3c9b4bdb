"""Replay the Dockerfile's CPU image without an engine, as far as that goes: `make test-container`.

RUN, COPY, ENV, ARG and WORKDIR of the stages behind `--target` are carried out below a fresh folder that stands for
`/`. Left out, and said so, are lines that change the image's own system (users, packages). Then the image's ENTRYPOINT
is started there as a user who may write to /data and /tmp only; its HEALTHCHECK must come true, and SIGTERM must end
it with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Stage", "main", "stages"]

ROOT = Path(__file__).resolve().parents[1]
WRITABLE = ("/data", "/tmp")  # noqa: S108
OURS = ("/opt/nested", "/src", "/data", "/tmp", "/home/nested")  # noqa: S108 - paths of the image
SYSTEM = re.compile(r"\b(useradd|apt-get|install -d)\b")
START_SECONDS = 1200.0  # numba compiles into an empty cache, perhaps on a busy machine


@dataclass
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def last(self, word: str) -> str:
        """The argument of the last such instruction, empty if there is none."""
        return next((text for one, text in reversed(self.lines) if one == word), "")


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    found: dict[str, Stage] = {}
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = stage = Stage(name, base)
        elif word:
            stage.lines.append((word, rest.strip()))
    return found


def chain(found: dict[str, Stage], name: str) -> list[Stage]:
    """A stage after the stages it is made from."""
    stage = found[name]
    return [*(chain(found, stage.base) if stage.base in found else []), stage]


class Replay:
    """The image's `/` as a folder of this machine."""

    def __init__(self, root: Path, python: str, arguments: dict[str, str]) -> None:
        self.root = root
        self.python = python
        self.arguments = arguments
        self.env = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        self.env |= {"PATH": f"{Path(python).parent}:/usr/bin:/bin", "HOME": str(root / "home/nested")}
        self.cwd = root
        for path in OURS:
            self.at(path).mkdir(parents=True, exist_ok=True)

    def at(self, path: str) -> Path:
        """A path of the image here."""
        return self.root / path.lstrip("/")

    def here(self, text: str) -> str:
        """A command with the image's paths replaced."""
        return re.sub(rf"(?<![\w/.])({'|'.join(OURS)})\b", lambda found: str(self.at(found[1])), text)

    def stage(self, stage: Stage) -> None:
        """Carry out a stage."""
        for word, rest in stage.lines:
            if word in {"RUN", "COPY", "ARG", "ENV", "WORKDIR"}:
                getattr(self, f"do_{word.lower()}")(rest)

    def do_run(self, rest: str) -> None:
        """A command, in a shell as the engine would."""
        if SYSTEM.search(rest):
            say(f"left out (needs the image's own system): RUN {rest}")
            return
        say(f"RUN {rest}")
        started = time.monotonic()
        subprocess.run(["/bin/sh", "-c", self.here(rest)], cwd=self.cwd, env=self.env, check=True)  # noqa: S603 - our file
        say(f"    {time.monotonic() - started:.0f} s")

    def do_copy(self, rest: str) -> None:
        """Files of the context that .dockerignore lets in."""
        if rest.startswith("--from="):
            return  # both stages share this folder
        *sources, target = shlex.split(rest)
        for source in sources:
            assert_in_context(source)
            to = self.cwd / target
            if (ROOT / source).is_dir():
                unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", "node_modules")
                shutil.copytree(ROOT / source, to, ignore=unwanted)
            else:
                shutil.copy(ROOT / source, to)

    def do_arg(self, rest: str) -> None:
        """A build argument: given, or its default."""
        name, _, default = rest.partition("=")
        self.env[name] = self.arguments.get(name, default)

    def do_env(self, rest: str) -> None:
        """Variables, with $PATH put in."""
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self.env[name] = self.here(value).replace("$PATH", self.env["PATH"])

    def do_workdir(self, rest: str) -> None:
        """Where the next lines run."""
        self.cwd = self.at(rest)
        self.cwd.mkdir(parents=True, exist_ok=True)

    def serve(self, image: list[Stage]) -> None:
        """ENTRYPOINT as a user who owns nothing, until HEALTHCHECK is true; then SIGTERM."""
        entry = next(json.loads(text) for stage in reversed(image) if (text := stage.last("ENTRYPOINT")))
        health = next(text for stage in reversed(image) if (text := stage.last("HEALTHCHECK")))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        keys = self.root / "api_keys"
        keys.write_text("tenant key-of-the-tenant\n")
        words = [port if word == "8000" else self.here(word) for word in entry]
        words += ["--api-key-file", str(keys)]
        words[0] = str(self.at("/opt/nested") / "bin" / words[0])
        check = json.loads(health[health.index("[") :].replace(":8000", f":{port}"))
        process = subprocess.Popen([*self._confined(), *words], cwd=self.at("/home/nested"), env=self.env)  # noqa: S603 - our image
        try:
            seconds = self._until_healthy(process, check)
            say(f"healthy after {seconds:.0f} s")
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
        finally:
            process.kill()
        if status != 0:
            raise SystemExit(f"after SIGTERM the server ended with {status}, not 0")
        say("SIGTERM: ended with 0")

    def _until_healthy(self, process: subprocess.Popen[bytes], check: list[str]) -> float:
        started = time.monotonic()
        check[0] = str(self.at("/opt/nested") / "bin" / check[0])
        while time.monotonic() - started < START_SECONDS:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode} before it was healthy")
            if subprocess.run(check, env=self.env, capture_output=True, check=False).returncode == 0:  # noqa: S603
                return time.monotonic() - started
            time.sleep(0.5)
        raise SystemExit(f"not healthy after {START_SECONDS:.0f} s")

    def _confined(self) -> list[str]:
        """A prefix that runs a command as the container would, as far as this machine lets it."""
        self.root.chmod(0o755)
        for path in WRITABLE:
            if os.geteuid() == 0:
                os.chown(self.at(path), 10001, 10001)
        prefix: list[str] = []
        binds = [f"mount --bind {self.at(path)} {self.at(path)}" for path in ("/", *WRITABLE)]
        script = " && ".join([*binds, f"mount -o remount,bind,ro {self.root}", 'exec "$@"'])
        mounted = ["unshare", "--mount", "sh", "-c", script, "sh"]
        user = ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
        for words, what in ((mounted, "read-only but for /data and /tmp"), (user, "as uid 10001")):
            works = _runs([*prefix, *words, str(self.at("/opt/nested") / "bin" / "python"), "-c", ""])
            say(f"{'run' if works else 'not possible here'}: {what}")
            prefix += words if works else []
        return prefix


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603 - our own words
    except OSError:
        return False


def assert_in_context(source: str) -> None:
    """The engine would not find what .dockerignore keeps out."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    if source.split("/", maxsplit=1)[0] not in allowed:
        raise SystemExit(f"COPY {source}: .dockerignore keeps it out of the context")


def say(text: str) -> None:
    """A line of the report."""
    print(text, flush=True)


def main() -> int:
    """Replay and serve."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--target", default="cpu")
    options.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    args = options.parse_args()
    found = stages((ROOT / "Dockerfile").read_text())
    image = chain(found, args.target)
    built = [
        name
        for word, rest in image[-1].lines
        if word == "COPY" and rest.startswith("--from=")
        for name in [rest[7:].split()[0]]
    ]
    with tempfile.TemporaryDirectory(prefix="nested-image-") as folder:
        replay = Replay(Path(folder), sys.executable, dict(pair.split("=", 1) for pair in args.build_arg))
        for stage in [*(one for name in built for one in chain(found, name)), *image]:
            say(f"-- stage {stage.name}")
            replay.stage(stage)
        replay.serve(image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
