"""`nested doctor`: what would run here (kernels, GPU, model, store), and what a running server says of itself."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..python import Client, ClientError
from .output import Output

__all__ = ["add"]

CHECK_SECONDS = 120.0


class Finding(BaseModel):
    """One thing looked at. `fail` makes the exit status 1."""

    check: str
    state: Literal["ok", "note", "fail"]
    detail: str


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    about = "what would run here (kernels, GPU, model, store), and whether the server is well"
    doctor = commands.add_parser("doctor", help=about, description=about, parents=[shared])
    doctor.add_argument("--store", metavar="URL", help="look at this store instead of the default one")
    doctor.add_argument("--model", metavar="PATH|NAME", help="look at this model instead of the shipped one")
    doctor.set_defaults(run=_run)


def _run(client: Client, args: argparse.Namespace, output: Output) -> int:
    with output.busy("looking"):
        findings = [*_here(), *_would_run(args), *_server(client)]
    output.items(findings, ["state", "check", "detail"], empty="nothing to look at")
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _here() -> Iterator[Finding]:
    yield Finding(check="python", state="ok", detail=f"{platform.python_version()} on {platform.machine()}")
    yield _package("nested-runtime", "install it: pip install -e . in the clone")
    yield _package("openai", "only for nested.openai() and `make demo`: pip install -e '.[demo]'")
    yield _program("redis-server", "only for the Redis store on this machine; SQLite needs nothing")


def _would_run(args: argparse.Namespace) -> Iterator[Finding]:
    """What `nested-serve --check` finds. The client itself knows neither torch nor stores."""
    program = Path(sys.executable).with_name("nested-serve")
    if not program.exists() or not _installed("torch"):
        yield Finding(check="serving", state="note", detail="clients only; to serve: pip install -e '.[serve]'")
        return
    options = [f"--{name}={value}" for name in ("store", "model") if (value := getattr(args, name)) is not None]
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            [str(program), "--check", *options], capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
        )
        yield from TypeAdapter(list[Finding]).validate_json(done.stdout)
    except subprocess.TimeoutExpired:
        slow = f"nested-serve --check did not end within {CHECK_SECONDS:.0f} s; is the machine busy?"
        yield Finding(check="serving", state="note", detail=slow)
    except ValidationError:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        yield Finding(check="serving", state="fail", detail=f"nested-serve --check: {last}")


def _server(client: Client) -> Iterator[Finding]:
    try:
        client.probe("/health")
    except ClientError as error:
        yield Finding(check="server", state="fail", detail=f"{error} (`make run` starts one; --base-url names another)")
        return
    yield Finding(check="server", state="ok", detail=f"{client.base_url} answers /health")
    try:
        models = ", ".join(model.id for model in client.models())
        yield Finding(check="models", state="ok" if models else "fail", detail=models or "the server serves none")
    except ClientError as error:
        yield Finding(check="models", state="fail", detail=str(error))
    for path in ("/ready", "/version"):
        try:
            answer = client.probe(path)
            yield Finding(check=path, state="ok", detail=", ".join(f"{k}={v}" for k, v in answer.items()) or "ok")
        except ClientError as error:
            yield Finding(check=path, state="fail" if path == "/ready" else "note", detail=str(error))


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _package(name: str, without: str) -> Finding:
    try:
        return Finding(check=name, state="ok", detail=version(name))
    except PackageNotFoundError:
        return Finding(check=name, state="note", detail=f"absent; {without}")


def _program(name: str, without: str) -> Finding:
    path = shutil.which(name)
    return Finding(check=name, state="ok" if path else "note", detail=path or f"absent; {without}")
