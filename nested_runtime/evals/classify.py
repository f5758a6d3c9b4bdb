"""`nested-eval classify`: a class-incremental stream of labelled texts, every example once, then all classes tested.

An example is a turn of the user (the text) and one of the assistant (the name of its class). The stream brings one
class after the other; then test texts of all classes are read from the memory it left, and the class is the name with
the highest log-probability per token. Names are compared with the same three memories:

    stream      the memory after the whole stream
    in context  a fresh memory that has read one example of every class, right before the question
    reset       a fresh memory: what the model knows without any example

`forgetting` is the accuracy on classes of the second half of the stream less that on classes of the first half.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_runtime.core import TurnResult
from nested_runtime.errors import ConfigError
from nested_runtime.evals.reader import Reader, Reading
from nested_runtime.evals.report import aligned, percent
from nested_runtime.evals.scoring import wilson
from nested_runtime.models.loading import load
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import read_rows

__all__ = ["WHAT", "Stream", "arguments", "run", "streams"]

WHAT = "learn classes one after another from a stream, each example once, then name the class of new texts"
TASKS = ("clinc150", "banking77")
MEMORIES = ("stream", "in context", "reset")
FILE = "cl_text"
NO_CONTENT = "N/A"
Example = tuple[str, str]  # text, name of its class


@dataclass(frozen=True)
class Stream:
    """One stream: classes in the order they come, examples to learn and to be tested on by class."""

    task: str
    classes: tuple[str, ...]
    learn: Mapping[str, tuple[str, ...]]
    test: Mapping[str, tuple[str, ...]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--classes", type=int, default=10, help="classes of a stream (default 10)")
    parser.add_argument("--shots", type=int, default=8, help="examples of a class (default 8)")
    parser.add_argument("--tests", type=int, default=4, help="test texts of a class (default 4)")
    parser.add_argument("--streams", type=int, default=3, help="streams a task, with other classes (default 3)")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure a checkpoint; the table and its JSON."""
    if args.data is None:
        raise ConfigError(
            f"classify needs --data, a folder with a {FILE}*.jsonl[.zst] of `task`, `split`, `text`, `label`"
        )
    if min(args.classes, args.shots, args.tests, args.streams) < 1 or args.classes < 2:
        raise ConfigError("--classes must be at least 2; --shots, --tests and --streams at least 1")
    loaded = load(args.model or "hope-nano")
    reader, rows, answers = Reader(loaded), [], []
    for task in args.tasks:
        found = [
            answer
            for number, stream in enumerate(streams(args.data, task, args))
            for answer in _sit(reader, stream, number)
        ]
        rows += _rows(task, found, args.classes)
        answers += found
    model = {"name": loaded.id, "fingerprint": loaded.fingerprint, "where": str(loaded.folder)}
    return _table(loaded.id, rows), {"model": model, "rows": rows, "answers": answers}


def streams(folder: Path, task: str, args: argparse.Namespace) -> list[Stream]:
    """The streams of a task: classes, order and examples are drawn from --seed."""
    texts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for path in sorted(folder.glob(f"{FILE}*.jsonl*")):
        for row in read_rows(path):
            if row.get("task") == task and row.get("split") in texts:
                texts[row["split"]].setdefault(row["label"], []).append(row["text"])
    learn, test = texts["train"], texts["test"]
    labels = sorted(
        label for label in learn if len(learn[label]) >= args.shots and len(test.get(label, ())) >= args.tests
    )
    if len(labels) < args.classes:
        raise ConfigError(f"--data {folder} has {len(labels)} classes of {task} with enough texts, not {args.classes}")
    out = []
    for number in range(args.streams):
        rng = random.Random(f"{args.seed}:{task}:{number}")
        classes = tuple(rng.sample(labels, args.classes))
        out.append(
            Stream(
                task,
                classes,
                {label: tuple(rng.sample(learn[label], args.shots)) for label in classes},
                {label: tuple(rng.sample(test[label], args.tests)) for label in classes},
            )
        )
    return out


# ---- one stream ------------------------------------------------------------------------------------------------------


def _sit(reader: Reader, stream: Stream, number: int) -> list[dict[str, Any]]:
    """Every test text with every memory: the true class, the named one, and where the class came in the stream."""
    tokenizer = reader.loaded.tokenizer
    order = [(text, label) for label in stream.classes for text in stream.learn[label]]
    shown = [(stream.learn[label][0], label) for label in stream.classes]
    both = reader.read([Reading(_examples(tokenizer, texts), keep=True) for texts in (order, shown)])
    memories = dict(zip(MEMORIES, (both[0].memory, both[1].memory, None), strict=True))
    tests = [(text, label) for label in stream.classes for text in stream.test[label]]
    out = []
    for name, memory in memories.items():
        *scores, empty = _scores(reader, memory, [*(text for text, _ in tests), NO_CONTENT], stream.classes)
        for (text, label), score in zip(tests, scores, strict=True):
            rise = [a - b for a, b in zip(score, empty, strict=True)]
            named, calibrated = (stream.classes[each.index(max(each))] for each in (score, rise))
            late = 2 * stream.classes.index(label) >= len(stream.classes)
            out.append(
                {
                    "task": stream.task, "stream": number, "memory": name, "text": text, "class": label, "late": late,
                    "named": named, "calibrated": calibrated, "right": named == label,
                    "calibrated_right": calibrated == label,
                }
            )  # fmt: skip
    return out


def _examples(tokenizer: Tokenizer, examples: Iterable[Example]) -> list[int]:
    messages = [m for text, label in examples for m in (_said("user", text), _said("assistant", _words(label)))]
    return tokenizer.render(messages, add_generation_prompt=False)


def _scores(
    reader: Reader, memory: TurnResult | None, texts: Sequence[str], classes: Sequence[str]
) -> list[list[float]]:
    """Mean log-probability of every class's name after every text. A text is read once; the names go on from there."""
    tokenizer = reader.loaded.tokenizer
    names = [[*tokenizer.encode(f" {_words(label)}"), tokenizer.end_id] for label in classes]
    asked = [tokenizer.render([_said("user", text)], True) for text in texts]
    heard = reader.read([Reading(tokens[:-1], memory, keep=True) for tokens in asked])
    found = []
    for tokens, outcome in zip(asked, heard, strict=True):
        told = reader.read([Reading([tokens[-1], *name], outcome.memory, score=True) for name in names])
        found.append([_mean([entry.logprob for entry in each.logprobs[1:] if entry]) for each in told])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _words(label: str) -> str:
    """The name of a class as text: card_arrival -> card arrival."""
    return label.replace("_", " ").lower()


# ---- figures ---------------------------------------------------------------------------------------------------------


def _rows(task: str, answers: Sequence[Mapping[str, Any]], classes: int) -> list[dict[str, Any]]:
    rows = []
    for memory in MEMORIES:
        mine = [answer for answer in answers if answer["memory"] == memory]
        right = sum(answer["right"] for answer in mine)
        low, high = wilson(right, len(mine))
        early, late = (_share([a["right"] for a in mine if a["late"] == late]) for late in (False, True))
        calibrated = _share([a["calibrated_right"] for a in mine])
        rows.append(
            {
                "task": task, "memory": memory, "tests": len(mine), "right": right, "share": right / len(mine),
                "low": low, "high": high, "first_half": early, "second_half": late, "forgetting": late - early,
                "calibrated": calibrated,
                "chance": 1 / classes,
            }
        )  # fmt: skip
    return rows


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [(title, "memory", "right, %", "95 %", "first half", "second half", "calibrated", "tests", "chance")]
    for row in rows:
        interval = f"{percent(row['low'])} - {percent(row['high'])}"
        halves = percent(row["first_half"]), percent(row["second_half"]), percent(row["calibrated"])
        lines.append(
            (
                row["task"],
                row["memory"],
                percent(row["share"]),
                interval,
                *halves,
                str(row["tests"]),
                percent(row["chance"]),
            )
        )
    return aligned(lines)
