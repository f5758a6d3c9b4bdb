"""`nested admin`: look after a server and the sessions of all its tenants, with the admin key."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..python import Admin, Client, ConfigError
from .output import Output

__all__ = ["add"]

Command = Callable[[Admin, argparse.Namespace, Output], int]


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command and its subcommands."""
    about = "look after a server (key: NESTED_ADMIN_KEY, or --api-key)"
    admin = commands.add_parser("admin", help=about, description=about, parents=[shared])
    actions = admin.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Command, help: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = actions.add_parser(name, help=help, description=help, parents=[shared])

        def run_as_admin(client: Client, args: argparse.Namespace, output: Output) -> int:
            return run(Admin(client), args, output)

        command.set_defaults(run=run_as_admin, key_variable="NESTED_ADMIN_KEY")
        return command

    action("stats", _stats, "engines, resident states and what the store holds")
    sessions = action("sessions", _sessions, "the sessions of all tenants")
    sessions.add_argument("--tenant", metavar="NAME", help="only this one's")
    show = action("show", _show, "one session with its kept versions")
    delete = action("delete", _delete, "erase one session, for good")
    for command in (show, delete):
        command.add_argument("tenant")
        command.add_argument("session")
    erase = action("erase", _erase, "erase all sessions of a tenant, for good")
    erase.add_argument("tenant")
    erase.add_argument("--prefix", metavar="TEXT", help="only those whose id begins with exactly this")
    for command in (delete, erase):
        command.add_argument("--yes", action="store_true", help="do not ask")
    evict = action("evict", _evict, "drop resident states; they are read from the store again when needed")
    evict.add_argument("--tenant", metavar="NAME", help="only this one's")
    action("flush", _flush, "have everything written, and see how durable it is")
    drain = action("drain", _drain, "take no more turns and wait for the running ones")
    drain.add_argument("--seconds", metavar="N", type=float, help="wait at most this long (default 20)")
    action("fsck", _fsck, "check everything stored and every slot; exit status 1 when something is wrong")


def _stats(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    stats = admin.stats()
    output.done("\n".join(f"{name}  {value}" for name, value in _flat(stats)), **stats)
    return 0


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _sessions(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    columns = ["tenant", "id", "version", "tokens", "bytes", "updated"]
    output.items(admin.sessions(args.tenant), columns, empty="no sessions yet")
    return 0


def _show(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    output.item(admin.show(args.tenant, args.session))
    return 0


def _delete(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    if not _agreed(args, f"session {args.session!r} of tenant {args.tenant!r}"):
        output.done("nothing erased", deleted=0)
        return 0
    deleted = admin.delete(args.tenant, args.session)
    output.done(f"{args.session} is erased" if deleted else f"{args.session} did not exist", deleted=deleted)
    return 0


def _erase(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    which = "every session" if not args.prefix else f"every session that begins with {args.prefix!r}"
    if not _agreed(args, f"{which} of tenant {args.tenant!r}"):
        output.done("nothing erased", deleted=0)
        return 0
    with output.busy("erasing"):
        deleted = admin.erase(args.tenant, args.prefix)
    output.done(f"{deleted} sessions of {args.tenant} are erased", deleted=deleted)
    return 0


def _agreed(args: argparse.Namespace, what: str) -> bool:
    """Whether to erase; who cannot be asked must have said so."""
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(f"erasing {what} cannot be undone and nobody is here to ask; add --yes")
    return input(f"Erase {what}, with snapshots and history, for good? [y/N] ").strip().lower() == "y"


def _evict(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    evicted = admin.evict(args.tenant)
    output.done(f"{evicted} resident states dropped", evicted=evicted)
    return 0


def _flush(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    answer = admin.flush()
    output.done(f"{answer['unwritten']} states unwritten; durability: {answer['durability']}", **answer)
    return 0


def _drain(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    with output.busy("draining"):
        running = admin.drain(args.seconds)
    output.done("drained: no turn is running" if not running else f"{running} turns still run", running=running)
    return 1 if running else 0


def _fsck(admin: Admin, args: argparse.Namespace, output: Output) -> int:
    with output.busy("checking everything stored"):
        problems = admin.fsck()
    output.done("\n".join(problems) or "healthy", healthy=not problems, problems=problems)
    return 1 if problems else 0
