"""`nested doctor`: what is installed here, and what the server says of itself."""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel

from ..python import Client, ClientError
from .output import Output

__all__ = ["add"]


class Finding(BaseModel):
    """One thing looked at. `fail` makes the exit status 1."""

    check: str
    state: Literal["ok", "note", "fail"]
    detail: str


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    about = "what is installed here, and whether the server is well"
    commands.add_parser("doctor", help=about, description=about, parents=[shared]).set_defaults(run=_run)


def _run(client: Client, args: argparse.Namespace, output: Output) -> int:
    findings = [*_here(), *_server(client)]
    output.items(findings, ["state", "check", "detail"], empty="nothing to look at")
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _here() -> Iterator[Finding]:
    yield Finding(check="python", state="ok", detail=f"{platform.python_version()} on {platform.machine()}")
    yield _package("nested-runtime", "install it: pip install -e . in the clone")
    yield _package("torch", "needed to serve: pip install -e '.[serve]'; clients do without")
    yield _package("numba", "speeds up the CPU kernels: pip install -e '.[serve]'")
    yield _package("openai", "only for `make demo`: pip install -e '.[demo]'")
    yield _program("redis-server", "only for the Redis store on this machine; SQLite needs nothing")
    yield _program("nvidia-smi", "no NVIDIA driver: models run on the CPU")


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


def _package(name: str, without: str) -> Finding:
    try:
        return Finding(check=name, state="ok", detail=version(name))
    except PackageNotFoundError:
        return Finding(check=name, state="note", detail=f"absent; {without}")


def _program(name: str, without: str) -> Finding:
    path = shutil.which(name)
    return Finding(check=name, state="ok" if path else "note", detail=path or f"absent; {without}")
