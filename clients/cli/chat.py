"""`nested chat`: talk to a session. Lines that begin with / are commands; each other line is one turn."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from ..python import Client, ClientError, ConfigError, ConnectionFailed, Reply, Session
from .output import Output, visible

__all__ = ["add"]

_HELP = """\
/memory            what the session holds: version, tokens, bytes, and each level
/snapshot          keep the present memory
/restore ID|N      go back to a snapshot, or to a kept version by its number
/reset [LEVEL ...] forget everything, or the named levels
/help              this
/quit              leave (Ctrl-D too); the memory stays"""


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    about = "talk to a model that remembers"
    chat = commands.add_parser("chat", help=about, description=about, parents=[shared])
    chat.add_argument("--session", metavar="ID", help="the memory to use; without it nothing is remembered")
    chat.add_argument("--model", metavar="ID", help="default: the first one the server has")
    chat.add_argument("--max-tokens", metavar="N", type=int, help="longest reply; default: the server's")
    chat.add_argument("--temperature", metavar="T", type=float, help="0 is greedy and reproducible")
    chat.add_argument("--no-stream", action="store_true", help="print replies when they are complete")
    chat.add_argument("message", nargs="?", help="one turn, then exit; without it a conversation")
    chat.set_defaults(run=_run)


class _Quit(Exception):
    """The user has had enough."""


class _Conversation:
    """Turns and commands against one session, or memoryless when there is none."""

    def __init__(self, client: Client, args: argparse.Namespace, output: Output) -> None:
        self._client = client
        self._session = client.session(args.session) if args.session is not None else None
        self._output = output
        self._stream = not args.no_stream and not output.json
        chosen = {"model": args.model, "max_tokens": args.max_tokens, "temperature": args.temperature}
        self._options: Any = {name: value for name, value in chosen.items() if value is not None}
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/help": self._help,
            "/memory": self._memory,
            "/quit": self._quit,
            "/reset": self._reset,
            "/restore": self._restore,
            "/snapshot": self._snapshot,
        }

    def take(self, line: str) -> None:
        """One line of input."""
        words = line.split()
        if not words:
            return
        if not words[0].startswith("/"):
            self.turn(line)
        elif (command := self._commands.get(words[0])) is not None:
            command(words[1:])
        else:
            raise ConfigError(f"there is no command {words[0]}; /help lists them")

    def turn(self, message: str) -> None:
        """Say it, print the reply."""
        speaker = self._session or self._client
        if not self._stream:
            self._print(speaker.chat(message, **self._options))
            return
        with speaker.stream(message, **self._options) as stream:
            said = False
            try:
                for piece in stream:
                    print(visible(piece), end="", flush=True)
                    said = True
            finally:
                if said:
                    print()

    def _print(self, reply: Reply) -> None:
        self._output.item(reply, text=visible(reply.text))

    @property
    def _remembering(self) -> Session:
        if self._session is None:
            raise ConfigError("this chat has no memory; start it with --session ID")
        return self._session

    def _help(self, words: list[str]) -> None:
        self._output.done(_HELP, help=_HELP)

    def _quit(self, words: list[str]) -> None:
        raise _Quit

    def _memory(self, words: list[str]) -> None:
        session = self._remembering
        info, levels = session.info(), session.levels()
        if self._output.json:
            self._output.done(
                "", **info.model_dump(mode="json"), levels=[one.model_dump(mode="json") for one in levels]
            )
            return
        self._output.item(info)
        print()
        self._output.items(levels, ["level", "norm", "change", "updates"], empty="no levels")

    def _reset(self, words: list[str]) -> None:
        info = self._remembering.reset(words or None)
        self._output.item(info, text=f"forgot {', '.join(words) or 'everything'}; now at version {info.version}")

    def _snapshot(self, words: list[str]) -> None:
        kept = self._remembering.snapshot()
        self._output.item(kept, text=f"snapshot {kept.snapshot} keeps version {kept.version}")

    def _restore(self, words: list[str]) -> None:
        if len(words) != 1:
            raise ConfigError("say what to go back to: /restore SNAPSHOT or /restore VERSION")
        session, to = self._remembering, words[0]
        info = session.restore(version=int(to)) if to.isdecimal() else session.restore(to)
        self._output.item(info, text=f"back at {to}, now version {info.version}")


def _run(client: Client, args: argparse.Namespace, output: Output) -> int:
    conversation = _Conversation(client, args, output)
    if args.message is not None:
        conversation.turn(args.message)
    elif sys.stdin.isatty():
        _converse(conversation, args)
    else:
        for line in sys.stdin:
            with contextlib.suppress(_Quit):
                conversation.take(line.rstrip("\n"))
                continue
            break
    return 0


def _converse(conversation: _Conversation, args: argparse.Namespace) -> None:
    """Prompt until the user leaves. An error is said and the conversation goes on, unless the server is gone."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() a line editor
    memory = f"session {args.session}" if args.session is not None else "no memory: --session ID gives one"
    print(f"{memory}; /help lists commands", file=sys.stderr)
    while True:
        try:
            conversation.take(input("> "))
        except (EOFError, _Quit):
            return
        except KeyboardInterrupt:
            print(" (stopped; /quit or Ctrl-D leaves)", file=sys.stderr)
        except ConnectionFailed:
            raise
        except ClientError as error:
            print(f"nested: {error}", file=sys.stderr)
