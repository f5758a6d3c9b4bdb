"""`nested completion`: the script that makes a shell complete the `nested` command (by shtab, from the parser)."""

from __future__ import annotations

import argparse
from typing import Any

import shtab

from .output import Output

__all__ = ["SHELLS", "add", "run"]

SHELLS = ("bash", "zsh", "fish")
_WHERE = """\
install it:
  bash   nested completion bash > ~/.local/share/bash-completion/completions/nested
  zsh    nested completion zsh > "${fpath[1]}/_nested"
  fish   nested completion fish > ~/.config/fish/completions/nested.fish"""


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    about = "print the completion script of a shell"
    command = commands.add_parser(
        "completion",
        help=about,
        description=about,
        epilog=_WHERE,
        parents=[shared],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("shell", choices=SHELLS)
    command.set_defaults(run=run)


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, output: Output) -> int:
    """Print the script."""
    script = shtab.complete(parser, shell=args.shell)
    output.done(script, shell=args.shell, script=script)
    return 0
