"""The clients alone: `make test-sdk` installs this project without the server's packages and names its Python."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PYTHON = os.environ.get("NESTED_SDK_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="NESTED_SDK_PYTHON is not set; make test-sdk sets it")

PROGRAM = """
import asyncio, importlib.util, json, sys
from clients.python import AsyncClient, Client

name = sys.argv[1]
with Client() as client:
    session = client.session(name)
    pieces = list(session.stream("My dog is called Rex.", temperature=0, max_tokens=8))

async def more():
    async with AsyncClient() as client:
        return await client.session(name).chat("What is my dog called?", temperature=0, max_tokens=8)

reply = asyncio.run(more())
heavy = ["torch", "numpy", "fastapi", "openai", "redis", "numba"]
print(json.dumps({
    "version": reply.session.version,
    "loaded": sorted(name for name in heavy if name in sys.modules),
    "installed": sorted(name for name in heavy if importlib.util.find_spec(name)),
    "from": importlib.util.find_spec("clients").origin,
}))
"""


def environment(url: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "NESTED_BASE_URL": url}


def test_the_sdk_works_without_torch(url: str, new_id: Callable[[], str], tmp_path: Path) -> None:
    done = subprocess.run(
        [PYTHON, "-c", PROGRAM, new_id()],
        env=environment(url),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["version"], found["loaded"], found["installed"]) == (2, [], [])
    assert "site-packages" in found["from"], "the installed package was to be tested, not the clone"


def test_the_command_works_without_torch(url: str, new_id: Callable[[], str], tmp_path: Path) -> None:
    nested = str(Path(PYTHON).with_name("nested"))
    for arguments in (["chat", "--session", new_id(), "hello"], ["sessions", "list", "--json"], ["doctor"]):
        done = subprocess.run(
            [nested, *arguments],
            env=environment(url),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
