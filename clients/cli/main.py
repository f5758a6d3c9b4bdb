"""`nested`: parse the command line, run the command, turn errors into one line and an exit status.

0 is success; 2 is the caller's side (usage, configuration, HTTP 4xx); 1 is anything else; 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from ..python import DEFAULT_BASE_URL, APIError, Client, ClientError, ConfigError, ServerError
from . import admin, chat, completion, doctor, sessions
from .output import Output

__all__ = ["main", "parser"]


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _shared() -> argparse.ArgumentParser:
    """Options of every command. They may stand before or after it, so no default may overwrite a value given before."""
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--base-url", metavar="URL", help=f"the server; else NESTED_BASE_URL, else {DEFAULT_BASE_URL}")
    shared.add_argument(
        "--api-key",
        metavar="KEY",
        help="else NESTED_API_KEY, of nested admin NESTED_ADMIN_KEY (better: a key here shows in `ps`)",
    )
    shared.add_argument(
        "--timeout", metavar="SECONDS", type=_positive, help="longest wait for the server (default 600)"
    )
    shared.add_argument("--json", action="store_true", help="machine-readable output: JSON, one document per answer")
    return shared


def parser() -> argparse.ArgumentParser:
    """The whole command line; docs and tests read it too."""
    shared = _shared()
    top = _Parser(
        prog="nested", description="Chat with models that remember, and look after the memories.", parents=[shared]
    )
    top.add_argument("--version", action="version", version=f"nested {_version()}")
    commands: Any = top.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (chat, sessions, admin, doctor, completion):
        module.add(commands, shared)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nested`; return the exit status."""
    args = parser().parse_args(argv)
    output = Output(json=getattr(args, "json", False))
    try:
        if args.run is completion.run:  # asks no server, and needs the whole command line
            return int(args.run(parser(), args, output))
        with _client(args) as client:
            return int(args.run(client, args, output))
    except ClientError as error:
        output.error(error)
        return 2 if isinstance(error, ConfigError | APIError) and not isinstance(error, ServerError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `nested ... | head`: the reader has what it wanted
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _client(args: argparse.Namespace) -> Client:
    options: dict[str, Any] = {"timeout": args.timeout} if "timeout" in args else {}
    key = getattr(args, "api_key", None) or os.environ.get(getattr(args, "key_variable", ""))
    return Client(getattr(args, "base_url", None), key, **options)


def _version() -> str:
    try:
        return version("nested-runtime")
    except PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
