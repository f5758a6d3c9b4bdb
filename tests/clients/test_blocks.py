"""Every code block of README and docs, run as it stands: page by page, in order, against one real server.

`bash` and `python` blocks run; `json` and `toml` ones are parsed; a `ts` one stands in clients/typescript, where tsc
and node have it. The comment before a block says otherwise: `<!-- file: NAME -->` writes it for the blocks after it,
`<!-- not run: REASON -->` leaves it out. A block of nothing but `make` lines is left to tests/meta/test_docs.py, which
knows the targets. The server's address, the model's name and the session "alice" are replaced by those of this test.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.api_reference import PAGE as API_PAGE
from tools.api_reference import page as api_page

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
FENCE = re.compile(r"^(?:<!-- (file|not run): (.+?) -->\n+)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MADE = {"docs/cli.md", "docs/api.md"}  # from the code, by tools/
MAX_NOT_RUN = 8
ADMIN = "key-of-the-admin"
SHELL = 'curl() { command curl --fail-with-body --silent --show-error "$@"; }\n'


@dataclass(frozen=True)
class Block:
    """One fenced block. `directive` is "file", "not run" or empty, `argument` what it says."""

    directive: str
    argument: str
    language: str
    code: str

    @property
    def only_make(self) -> bool:
        lines = [line for line in self.code.splitlines() if line.strip() and not line.startswith("#")]
        return self.language == "bash" and all(line.startswith("make ") for line in lines)

    @property
    def runs(self) -> bool:
        return self.language in {"bash", "python"} and not self.directive and not self.only_make


def blocks(page: Path) -> list[Block]:
    return [Block(*(part or "" for part in found)) for found in FENCE.findall(page.read_text())]


PAGES = {
    str(path.relative_to(ROOT)): blocks(path) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
RUN = [name for name, found in PAGES.items() if any(block.runs for block in found)]


def test_every_block_says_what_it_is() -> None:
    known = {"bash", "python", "json", "toml", "ts", "text", "yaml"}
    for name, found in PAGES.items():
        fences = re.findall(r"^```", (ROOT / name).read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(found), f"{name} has a block that this test cannot read"
        for block in found:
            assert block.language in known, f"{name} has a block of language {block.language!r}; known: {sorted(known)}"


def test_few_blocks_are_left_out_and_each_says_why() -> None:
    left_out = [
        (name, block.argument) for name, found in PAGES.items() for block in found if block.directive == "not run"
    ]
    assert len(left_out) <= MAX_NOT_RUN, left_out
    assert all(len(reason.split()) >= 3 for _, reason in left_out), left_out
    assert "README.md" in RUN
    assert len(RUN) >= 5


@pytest.mark.parametrize("name", [name for name in PAGES if name not in MADE])
def test_data_can_be_read(name: str) -> None:
    programs = [path.read_text() for path in (ROOT / "clients" / "typescript").glob("*.ts")]
    for block in PAGES[name]:
        if block.language == "json":
            json.loads(block.code)
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "ts":
            assert any(block.code in program for program in programs), f"{name} shows code that is in no .ts file"


def test_the_api_reference_is_not_stale() -> None:
    assert API_PAGE.read_text() == api_page(), "the API has changed: make docs, and commit docs/api.md"


@pytest.fixture(scope="module")
def server(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """One server for all pages, with the admin API."""
    keys = tmp_path_factory.mktemp("keys") / "admin"
    keys.write_text(ADMIN)
    return start_server("--admin-key-file", str(keys))


class Page:
    """A page being run: its folder, its environment, its own session."""

    def __init__(self, name: str, url: str, folder: Path) -> None:
        self.folder = folder
        self.words = {
            "http://127.0.0.1:8000": url,
            "hope-nano": "tiny",
            "alice": f"alice_{re.sub(r'[^a-z]', '_', name.lower())}",
            ".venv/bin/": "",
        }
        for part in ("deploy", "clients", "README.md"):
            (folder / part).symlink_to(ROOT / part)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("NESTED_")}
        self.env = {
            **kept,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": f"{folder}:{ROOT}",
            "HOME": str(folder),
            "NESTED_BASE_URL": url,
            "NESTED_ADMIN_KEY": ADMIN,
        }

    def put(self, code: str) -> str:
        """The code with this test's words in it."""
        for word, replacement in self.words.items():
            code = code.replace(word, replacement)
        return code

    def run(self, language: str, code: str) -> None:
        programs = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}
        command = [*programs[language], (SHELL if language == "bash" else "") + self.put(code)]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n--- says ---\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def programs(found: list[Block], page: Page) -> Iterator[tuple[str, str]]:
    """What to run. Blocks of one language that follow one another are one program: starting Python takes longest."""
    for block in found:
        if block.directive == "file":
            (page.folder / block.argument).write_text(page.put(block.code))
    for language, group in itertools.groupby(
        (block for block in found if block.runs), key=lambda block: block.language
    ):
        yield language, "\n".join(block.code for block in group)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUN)
def test_the_blocks_of_a_page_run(name: str, server: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None and any("curl" in block.code for block in PAGES[name]):
        pytest.skip("curl is not installed")
    page = Page(name, server, tmp_path)
    for language, code in programs(PAGES[name], page):
        page.run(language, code)
