"""`nested-eval`: measure a checkpoint, or a model behind a running server."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from nested_runtime.errors import ConfigError, NestedError
from nested_runtime.evals import ablation, adaptation, classify, fluency, formal, mad, niah, report
from nested_runtime.evals.exam import Examiner, held_out_exchanges
from nested_runtime.evals.in_process import InProcess
from nested_runtime.evals.measures import MEASURES, Item, measure, plans
from nested_runtime.evals.over_http import connect
from nested_runtime.evals.subject import Subject
from nested_runtime.models.loading import load

__all__ = ["main"]

DEFAULT_MODEL = "hope-nano"
STUDIES: dict[str, Any] = {
    "ablation": ablation, "adaptation": adaptation, "classify": classify, "niah": niah, "mad": mad.STUDY,
    "formal": formal.STUDY,
}  # fmt: skip  # modules with WHAT, arguments(parser), run(args) -> table, JSON
FLUENCY = "perplexity on held-out chats and prose, inside a window of 512 tokens and beyond it"


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of printing usage: one clear line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (nested-eval --help lists the options)")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number over 0")
    return int(text)


def _size(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    add = common.add_argument
    add(
        "--model", metavar="PATH|NAME", help=f"checkpoint (default {DEFAULT_MODEL}); with --base-url an id served there"
    )
    add("--data", type=Path, metavar="DIR", help="data folder: its held-out chats serve as small talk and for fluency")
    add("--seed", type=int, default=0)
    add("--limit", type=_count, metavar="N", help="at most N questions a row (fluency: N streams a kind of text)")
    add(
        "--out", type=Path, default=Path("build/evals"), metavar="DIR", help="where the JSON goes (default build/evals)"
    )
    memory = _Parser(add_help=False)
    add = memory.add_argument
    add("--base-url", metavar="URL", help="measure a running server instead of a checkpoint")
    add("--api-key", metavar="KEY", help="the server's API key")
    add("--quantize", choices=("none", "int8"), default="none", help="of a checkpoint: int8 as nested-serve has it")
    add("--split", choices=("dev", "test"), default="dev", help="phrasings and values that training never drew")
    add("--sessions", type=_count, default=100)
    add("--facts", type=_count, default=6, help="facts of a session (distance has its own)")
    add("--filler-tokens", type=_size, default=0, metavar="N", help="small talk between telling and asking")
    add("--slots", type=_count, default=64, help="sessions in one engine step, or connections to the server")
    add(
        "--independent",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="every question meets the memory as teaching left it; otherwise questions and answers enter it one by one",
    )
    parser = _Parser(prog="nested-eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join([*MEASURES, *STUDIES, "fluency"]))
    for name, what in MEASURES.items():
        commands.add_parser(name, parents=[common, memory], help=what, description=what)
    for name, study in STUDIES.items():
        study.arguments(commands.add_parser(name, parents=[common], help=study.WHAT, description=study.WHAT))
    fluent = commands.add_parser("fluency", parents=[common], help=FLUENCY, description=FLUENCY)
    fluent.add_argument("--control", metavar="PATH|NAME", help="another checkpoint, on the same text")
    return parser


@contextmanager
def _subject(args: argparse.Namespace) -> Iterator[Subject]:
    if not args.base_url:
        loaded = load(args.model or DEFAULT_MODEL, int8=args.quantize == "int8")
        yield InProcess(loaded, slots=args.slots)
        return
    if args.quantize != "none":
        raise ConfigError("--quantize is of a checkpoint; a server behind --base-url is started with its own")
    with connect(args.base_url, api_key=args.api_key, model=args.model, connections=args.slots) as subject:
        yield subject


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} sessions", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _measure(args: argparse.Namespace, subject: Subject) -> tuple[str, dict[str, Any]]:
    """Run a measure of memory; the tables and their JSON."""
    chats = held_out_exchanges(args.data) if args.data else ()
    examiner = Examiner(args.split, args.seed, subject.lengths, chats)
    items: list[Item] = []
    for plan in plans(args.command, args.facts, args.filler_tokens):
        items += measure(
            subject, examiner, plan, args.sessions,
            limit=args.limit, independent=args.independent, progress=_progress,
        )  # fmt: skip
    rows, groups = report.rows(items), report.breakdown(items)
    tables = [report.table(f"{args.command}: {subject.name}, {args.split}", rows)]
    tables += [report.table(f"told facts by {name}", group) for name, group in groups.items()]
    return "\n\n".join(tables), {
        "model": {"name": subject.name, "fingerprint": subject.fingerprint, "where": subject.where},
        "rows": [row.body() for row in rows],
        "breakdown": {name: [row.body() for row in group] for name, group in groups.items()},
        "items": [report.item_body(item) for item in items],
    }


def _run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    started, now = time.monotonic(), datetime.now(UTC)
    if args.command in STUDIES:
        text, body = STUDIES[args.command].run(args)
    elif args.command in MEASURES:
        with _subject(args) as subject:
            text, body = _measure(args, subject)
    elif args.data is None or not args.data.is_dir():
        print(f"nested-eval fluency: SKIPPED: --data is {args.data}, not a folder of chats and prose", file=sys.stderr)
        return
    else:
        text, body = fluency.run(args.model or DEFAULT_MODEL, args.control, args.data, args.limit)
    seconds = round(time.monotonic() - started, 1)
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "api_key"}
    head = {"command": shlex.join(["nested-eval", *_without_key(argv)]), "created": now.isoformat(timespec="seconds")}
    path = args.out / f"{args.command}-{now:%Y%m%dT%H%M%S}.json"
    report.write(path, {**head, "seconds": seconds, "options": options, **body})
    print(f"{text}\n\n{seconds} s, written to {path}")


def _without_key(argv: Sequence[str]) -> list[str]:
    """The command line without its secret."""
    out = list(argv)
    for place, word in enumerate(out):
        if word.startswith("--api-key="):
            out[place] = "--api-key=..."
        elif word == "--api-key" and place + 1 < len(out):
            out[place + 1] = "..."
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad option, model or server is one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _run(_parser().parse_args(argv), argv)
    except NestedError as error:
        print(f"nested-eval: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
