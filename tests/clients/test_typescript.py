"""The TypeScript types: made from the present document, accepted by tsc, and right about what a real server answers.

What needs node runs in `make test-typescript`, which installs the packages beside and names the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.openapi import digest, session_api

HERE = Path(__file__).resolve().parents[2] / "clients" / "typescript"
INSTALLED = os.environ.get("NESTED_NODE_FOLDER", "")
with_node = pytest.mark.skipif(not INSTALLED, reason="NESTED_NODE_FOLDER is not set; make test-typescript sets it")


def test_the_types_are_of_the_present_document() -> None:
    first = (HERE / "session-api.ts").read_text().splitlines()[0]
    assert digest() in first, "the session API has changed: make typescript, and commit what it writes"


def test_every_schema_has_its_type() -> None:
    """Of the document itself, so that a generator that leaves something out is seen."""
    text = (HERE / "session-api.ts").read_text()
    for name, schema in session_api()["components"]["schemas"].items():
        assert f"export type {name} = components['schemas']['{name}'];" in text
        body = re.search(rf"^        {name}: \{{\n(.*?)^        }}", text, re.MULTILINE | re.DOTALL)
        assert body, name
        required = set(schema.get("required", ()))
        for field in schema.get("properties", {}):
            mark = "" if field in required else "\\?"
            assert re.search(rf"^            {field}{mark}: ", body[1], re.MULTILINE), f"{name}.{field}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the packages installed."""
    folder = tmp_path_factory.mktemp("typescript")
    for file in HERE.iterdir():
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(Path(INSTALLED).resolve() / "node_modules")
    return folder


def tsc(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["node_modules/.bin/tsc", "-p", ".", *options]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)


WRONG = """
import { sessions, type SessionInfo } from "./nested.js";
const info = {} as SessionInfo;
export const a: string = info.version;
export const b = info.no_such_field;
export const c = await sessions().POST("/v1/sessions/{id}/fork", { params: { path: { id: "a" } }, body: {} });
export const d = await sessions().GET("/v1/sessions/{id}/no-such-route", { params: { path: { id: "a" } } });
"""


@with_node
def test_tsc_accepts_right_and_refuses_wrong_use(project: Path) -> None:
    done = tsc(project, "--noEmit")
    assert done.returncode == 0, done.stdout
    wrong = project / "wrong.ts"
    wrong.write_text(WRONG)
    try:
        refused = tsc(project, "--noEmit")
    finally:
        wrong.unlink()
    assert re.findall(r"wrong\.ts\((\d+),", refused.stdout) == ["4", "5", "6", "7"], refused.stdout


@with_node
def test_the_example_runs(project: Path, url: str, new_id: Callable[[], str]) -> None:
    assert tsc(project, "--outDir", "built").returncode == 0
    shutil.copy(project / "package.json", project / "built")
    done = subprocess.run(
        ["node", "built/example.js", new_id(), url],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    versions = [line for line in done.stdout.splitlines() if line.startswith("version")]
    assert versions == ["version 1", "version 2", "version 3 digest kept true"]
