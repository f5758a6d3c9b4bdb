"""The examples of README.md, run as they stand against a real server (its address and model put in)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
CURL = [code for language, code in BLOCKS if language == "bash" and code.startswith("curl")]


def against(url: str, code: str, session: str) -> str:
    return code.replace("http://127.0.0.1:8000", url).replace("hope-nano", "tiny").replace("alice", session)


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 2
    assert CURL


@pytest.mark.parametrize("code", PYTHON, ids=["openai", "sdk", *map(str, range(2, len(PYTHON)))][: len(PYTHON)])
def test_python_examples_run(code: str, url: str, new_id: Callable[[], str]) -> None:
    env = {**os.environ, "NESTED_BASE_URL": url}
    if "before = " in code:  # this one goes on with a session that exists
        code = code.replace("    before =", '    alice.learn("hello")\n    before =')
    command = [sys.executable, "-c", against(url, code, new_id())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("code", CURL)
def test_curl_examples_run(code: str, url: str, new_id: Callable[[], str]) -> None:
    script = against(url, code, new_id()).replace("curl ", "curl --fail-with-body --silent --show-error ")
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"chat.completion"') == 2
    assert '"version":2' in done.stdout.replace(" ", "")
