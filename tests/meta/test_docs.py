"""README and docs name only what exists: make targets, commands, options, files, links."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


def code_of(markdown: str) -> str:
    """The fenced blocks and inline code of a page."""
    blocks = re.findall(r"^```.*?^```", markdown, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))
    return "\n".join(blocks + inline)


@each_text
def test_docs_name_make_targets_that_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|[\s;&(])make ([a-z][a-z-]*)", code_of(path.read_text()), re.MULTILINE))
    assert named <= targets, f"{path.name} names make targets that do not exist: {sorted(named - targets)}"


@each_text
def test_docs_name_commands_that_exist(path: Path) -> None:
    named = set(re.findall(r"\bnested-[a-z]+\b", code_of(path.read_text())))
    known = set(PROJECT["project"]["scripts"]) | {PROJECT["project"]["name"]}
    assert named <= known, f"{path.name} names commands that do not exist: {sorted(named - known)}"


@each_text
def test_docs_link_to_what_exists(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), f"{path.name} links to {link}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{path.name} links to {link}, which has no such heading"


@each_text
def test_docs_name_tests_that_exist(path: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", path.read_text()):
        assert (ROOT / file).is_file(), f"{path.name} names {file}, which does not exist"
        text = (ROOT / file).read_text()
        assert not name or f"def {name}(" in text, f"{path.name} names {name}, which is not in {file}"


def test_docs_tree_of_the_readme_is_the_tree() -> None:
    block = re.search(r"## The tree\n.*?```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README.md ends with the captioned tree"
    listed = re.findall(r"^([\w./-]+)", block[1], re.MULTILINE)
    parent = Path()
    for line in block[1].splitlines():
        name = line.split()[0] if line.split() else ""
        parent = parent if line.startswith(" ") else Path()
        assert not name or (ROOT / parent / name).exists(), f"README.md names {parent / name}: it does not exist"
        if not line.startswith(" ") and name.endswith("/"):
            parent = Path(name)
    assert {f"{package}/" for package in ("nested_runtime", "server", "clients")} <= set(listed)


def test_ci_runs_what_the_readme_names() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    made = re.findall(r"^\s*make (.+)$", script, re.MULTILINE)
    assert made == ["test"]
    assert "make test" in (ROOT / "README.md").read_text()


def tracked() -> list[Path]:
    """The files git has, or those of the folder when this is an unpacked archive."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listing.stdout.split("\0") if listing.returncode == 0 else []
    paths = [ROOT / name for name in names if name] or [p for p in ROOT.rglob("*") if ".venv" not in p.parts]
    return [path for path in paths if path.is_file()]


TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".html", ".js", ".css", ".lua", ".cfg", ""}


def test_no_path_of_one_machine_is_in_the_tree() -> None:
    here = re.compile("/(?:" + "|".join(["work/(?:main|shared)", "home/\\w+/", "root/\\.", "Users/\\w+/"]) + ")")
    found = []
    for path in tracked():
        if path.suffix not in TEXT_SUFFIXES or path.name == "tokenizer.json":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if here.search(line) and path != Path(__file__).resolve():
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "absolute paths of one machine:\n" + "\n".join(found)


def test_packages_are_those_on_disk() -> None:
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["nested_runtime", "server", "clients"]
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]
    assert "torch==2.13.0" in PROJECT["project"]["optional-dependencies"]["serve"]


def test_clients_install_without_torch() -> None:
    base = {re.split(r"[<>=\[]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}
    assert base == {"httpx", "pydantic", "shtab", "tqdm"}
