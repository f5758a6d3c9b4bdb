"""`nested sessions`: look at memories, reset, delete, snapshot, restore, fork, move them."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shtab

from ..python import APIError, Client, ConfigError
from .output import Output

__all__ = ["add"]

Command = Callable[[Client, argparse.Namespace, Output], int]


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command and its subcommands."""
    sessions = commands.add_parser("sessions", help="list, inspect and change memories", parents=[shared])
    actions = sessions.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Command, help: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = actions.add_parser(name, help=help, description=help, parents=[shared])
        command.set_defaults(run=run)
        if name != "list":
            command.add_argument("session", help="the session's id")
        return command

    action("list", _list, "the sessions of this API key")
    action("show", _show, "version, tokens, size and digest of a session")
    action("history", _history, "the versions that are kept")
    action("snapshots", _snapshots, "the snapshots that are kept")
    action("snapshot", _snapshot, "keep the present version")
    reset = action("reset", _reset, "forget, everything or some levels")
    reset.add_argument(
        "--level", metavar="NAME", action="append", help="only this level, e.g. fast or cms.1; may repeat"
    )
    rest = action("consolidate", _consolidate, "let slower levels learn the recent tokens")
    rest.add_argument("--passes", metavar="N", type=int, default=1, help="times they are read (default 1)")
    rest.add_argument(
        "--decay", metavar="X", type=float, default=0.0, help="what faster levels lose, 0 to 1 (default 0)"
    )
    delete = action("delete", _delete, "erase a session with its snapshots and history, for good")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    restore = action("restore", _restore, "go back to a snapshot or to a kept version")
    to = restore.add_mutually_exclusive_group(required=True)
    to.add_argument("--snapshot", metavar="ID", help="a snapshot; `nested sessions snapshots` lists them")
    to.add_argument("--version", metavar="N", type=int, dest="to_version", help="a kept version, by its number")
    fork = action("fork", _fork, "copy a memory into a new session")
    fork.add_argument("new", help="the id of the new session")
    fork.add_argument("--version", metavar="N", type=int, dest="from_version", help="copy this kept version")
    export = action("export", _export, "write the memory to a file")
    _file(export, "where to write; - is standard output")
    export.add_argument("--force", action="store_true", help="replace the file if it exists")
    learn = action("learn", _learn, "read a text into the memory, paragraph by paragraph, without answers")
    _file(learn, "a UTF-8 text; - is standard input")
    load = action("import", _import, "replace the memory by an exported one")
    _file(load, "an exported file; - is standard input")


def _file(command: argparse.ArgumentParser, help: str) -> None:
    """A file argument that shells complete."""
    command.add_argument("file", help=help).complete = shtab.FILE  # type: ignore[attr-defined]


def _list(client: Client, args: argparse.Namespace, output: Output) -> int:
    output.items(client.sessions(), ["id", "version", "tokens", "bytes", "updated"], empty="no sessions yet")
    return 0


def _show(client: Client, args: argparse.Namespace, output: Output) -> int:
    output.item(client.session(args.session).info())
    return 0


def _history(client: Client, args: argparse.Namespace, output: Output) -> int:
    versions = client.session(args.session).history()
    output.items(versions, ["version", "kind", "parent", "tokens", "created", "digest"], empty="no versions")
    return 0


def _snapshots(client: Client, args: argparse.Namespace, output: Output) -> int:
    output.items(
        client.session(args.session).snapshots(), ["snapshot", "version", "label", "created"], empty="no snapshots"
    )
    return 0


def _snapshot(client: Client, args: argparse.Namespace, output: Output) -> int:
    kept = client.session(args.session).snapshot()
    output.item(kept, text=f"snapshot {kept.snapshot} keeps version {kept.version}")
    return 0


def _reset(client: Client, args: argparse.Namespace, output: Output) -> int:
    info = client.session(args.session).reset(args.level)
    forgotten = ", ".join(args.level) if args.level else "everything"
    output.item(info, text=f"{args.session} forgot {forgotten}; it is at version {info.version}")
    return 0


def _consolidate(client: Client, args: argparse.Namespace, output: Output) -> int:
    info = client.session(args.session).consolidate(passes=args.passes, decay=args.decay)
    output.item(info, text=f"{args.session} consolidated; it is at version {info.version}")
    return 0


def _delete(client: Client, args: argparse.Namespace, output: Output) -> int:
    if not args.yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"deleting {args.session!r} cannot be undone and nobody is here to ask; add --yes")
        if input(f"Erase {args.session!r} with its snapshots and history, for good? [y/N] ").strip().lower() != "y":
            output.done("nothing deleted", id=args.session, deleted=False)
            return 0
    client.session(args.session).delete()
    output.done(f"{args.session} is erased", id=args.session, deleted=True)
    return 0


def _restore(client: Client, args: argparse.Namespace, output: Output) -> int:
    info = client.session(args.session).restore(args.snapshot, version=args.to_version)
    back = f"snapshot {args.snapshot}" if args.snapshot else f"version {args.to_version}"
    output.item(info, text=f"{args.session} is back at {back}, now version {info.version}")
    return 0


def _fork(client: Client, args: argparse.Namespace, output: Output) -> int:
    info = client.session(args.session).fork(args.new, version=args.from_version)
    output.item(info, text=f"{args.new} starts with the memory of {args.session}, at version {info.version}")
    return 0


def _export(client: Client, args: argparse.Namespace, output: Output) -> int:
    to_file = args.file != "-"
    path = Path(args.file)
    if to_file and path.exists() and not args.force:
        raise ConfigError(f"{args.file} exists; choose another name or add --force")
    with output.progress("export", None) as bar:
        blob = client.session(args.session).export(bar.update)
    if not to_file:
        sys.stdout.buffer.write(blob)
        return 0
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # it is private text
            file.write(blob)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {args.file}: {error.strerror}") from None
    output.done(f"{len(blob):,} bytes in {args.file}", id=args.session, file=args.file, bytes=len(blob))
    return 0


def _learn(client: Client, args: argparse.Namespace, output: Output) -> int:
    """Each paragraph is a version of its own: what was read before an error stays, and the error counts it."""
    paragraphs = _paragraphs(args.file)
    session = client.session(args.session)
    with output.progress("learn", len(paragraphs), unit=" paragraphs") as bar:
        for number, paragraph in enumerate(paragraphs):
            try:
                reference = session.learn(paragraph)
            except APIError as error:
                error.args = (f"{number} of {len(paragraphs)} paragraphs were learned, then: {error}",)
                raise
            bar.update()
    text = f"{args.session} learned {len(paragraphs)} paragraphs; it is at version {reference.version}"
    output.item(reference, text=text)
    return 0


def _paragraphs(file: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: byte {error.start} is {data[error.start]:#x}") from None
    found = [paragraph.strip() for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]
    if not found:
        raise ConfigError(f"{file} has no text to learn")
    return found


def _import(client: Client, args: argparse.Namespace, output: Output) -> int:
    try:
        blob = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {args.file}: {error.strerror}") from None
    with output.busy("import"):
        info = client.session(args.session).import_(blob)
    output.item(info, text=f"{args.session} has the imported memory, at version {info.version}")
    return 0
