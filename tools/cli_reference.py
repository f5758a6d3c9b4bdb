"""docs/cli.md, from the parser of `nested`: `python -m tools.cli_reference` writes it, a test compares."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from clients.cli.main import parser

__all__ = ["PAGE", "commands", "page"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """\
# The nested command

<!-- made by `make docs` from clients/cli; a test fails when it is stale -->

`nested` exits with 0 for success, 2 when the request or its settings are wrong (usage, HTTP 4xx), 1 for anything else,
130 for Ctrl-C. Errors are one line on stderr, with `--json` one JSON object. Long work shows a bar, or the time, when
stderr is a terminal.
"""


def commands(
    top: argparse.ArgumentParser | None = None, name: str = "nested"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, by its full name."""
    top = top or parser()
    inner = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield name, top
    for action in inner:
        for word, command in action.choices.items():
            yield from commands(command, f"{name} {word}")


def page() -> str:
    """The whole page."""
    top = parser()
    shared = set(map(id, top._actions))  # argparse gives children the parents' own objects
    parts = [HEAD, "## Options of every command\n", _table(top, set())]
    for name, command in commands(top):
        about = command.description or ""
        parts.append(f"## {name}\n")
        parts.append(f"{about[:1].upper()}{about[1:]}.\n")
        parts.append(_usage(name, command, shared))
        if table := _table(command, shared):
            parts.append(table)
        if command.epilog:
            parts.append(f"```text\n{command.epilog}\n```\n")
    return "\n".join(parts)


def _own(command: argparse.ArgumentParser, shared: set[int]) -> list[argparse.Action]:
    """Its arguments but for help, version and those of every command."""
    return [
        action
        for action in command._actions
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction | argparse._VersionAction)
        and id(action) not in shared
    ]


def _usage(name: str, command: argparse.ArgumentParser, shared: set[int]) -> str:
    words = [name]
    for action in _own(command, shared):
        word = _named(action)
        words.append(word if action.required else f"[{word}]")
    return f"```text\n{' '.join(words)}\n```\n"


def _named(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(action.choices) if action.choices else action.dest.upper())
    if not action.option_strings:
        return str(value) if action.choices else str(action.metavar or action.dest).upper()
    return action.option_strings[-1] if action.nargs == 0 else f"{action.option_strings[-1]} {value}"


def _table(command: argparse.ArgumentParser, shared: set[int]) -> str:
    rows = [(_named(action), action.help or "") for action in _own(command, shared)]
    if not rows:
        return ""
    cells = [f"| `{name.replace('|', ' or ')}` | {about.replace('|', chr(92) + '|')} |" for name, about in rows]
    return "\n".join(["| argument | what |", "|---|---|", *cells]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
