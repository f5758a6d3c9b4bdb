"""Shell completion, the generated reference, and what holds for every command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clients.cli.completion import SHELLS
from tools.cli_reference import PAGE, commands, page

NESTED = str(Path(sys.executable).parent / "nested")
COMMANDS = dict(commands())


def script(shell: str) -> str:
    return subprocess.run([NESTED, "completion", shell], capture_output=True, text=True, check=True).stdout


def test_the_reference_is_not_stale() -> None:
    assert PAGE.read_text() == page(), "the command line has changed: make docs, and commit docs/cli.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_and_takes_json(name: str) -> None:
    assert f"\n## {name}\n" in page()
    assert "--json" in COMMANDS[name].format_help()
    assert COMMANDS[name].description
    for action in COMMANDS[name]._actions:
        assert action.help or action.dest in {"tenant", "session", "shell"}, f"{name}: {action.dest} has no help"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_knows_every_word(shell: str) -> None:
    text = script(shell)
    for name in COMMANDS:
        for word in name.split()[1:]:
            assert word in text
    assert "--temperature" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", "-c", text], check=True, timeout=60)


def complete_in_bash(*words: str) -> list[str]:
    """What bash offers at the end of these words."""
    code = (
        f"{script('bash')}\nCOMP_WORDS=({' '.join(map(repr, words))})\nCOMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        "function_name=$(complete -p nested | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        "$function_name nested \"${COMP_WORDS[COMP_CWORD]}\" ''\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


def complete_in_fish(line: str) -> list[str]:
    code = f"{script('fish')}\ncomplete -C '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return [row.split("\t")[0] for row in done.stdout.splitlines()]


def test_bash_completes() -> None:
    assert {"chat", "sessions", "admin", "doctor", "completion"} <= set(complete_in_bash("nested", ""))
    assert set(complete_in_bash("nested", "sessions", "re")) == {"reset", "restore"}
    assert "--snapshot" in complete_in_bash("nested", "sessions", "restore", "--s")
    assert complete_in_bash("nested", "completion", "f") == ["fish"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes() -> None:
    assert {"chat", "sessions", "admin", "doctor", "completion"} <= set(complete_in_fish("nested "))
    assert {"reset", "restore"} <= set(complete_in_fish("nested sessions re"))


def test_as_json() -> None:
    done = subprocess.run([NESTED, "completion", "zsh", "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["shell"], "#compdef nested" in found["script"]) == ("zsh", True)
