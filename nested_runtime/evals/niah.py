"""`nested-eval niah`: one fact in a haystack of prose, asked for at its end (as RULER's S-NIAH, 2404.06654).

The haystack is held-out prose of the data folder, or the generator's small talk without one, of L tokens in all; the
fact stands at a depth of 0 to 1 in it. A compressive memory is expected to lose needles in long haystacks (NL Table 3).
The control is the question alone, to a memory that has read nothing.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nested_runtime.errors import ConfigError
from nested_runtime.evals.exam import Exam, Examiner, Plan
from nested_runtime.evals.reader import Outcome, Reader, Reading
from nested_runtime.evals.report import aligned, percent
from nested_runtime.evals.scoring import is_right, wilson
from nested_runtime.evals.subject import MAX_TOKENS
from nested_runtime.models.loading import LoadedModel, load
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import PROSE_FILES, documents
from nested_runtime.train.values import lines

__all__ = ["WHAT", "arguments", "haystack", "run"]

WHAT = "one fact in a haystack of 1k to 16k tokens of prose, asked for at its end"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of the haystacks")
    parser.add_argument("--needles", type=int, default=2, help="facts for each length and depth (default 2)")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure a checkpoint; the table and its JSON."""
    if min(args.lengths) < 1 or args.needles < 1:
        raise ConfigError(f"--lengths and --needles must be at least 1, got {min(args.lengths)} and {args.needles}")
    loaded = load(args.model or "hope-nano")
    reader, straw = Reader(loaded, slots=8), _Straw(loaded.tokenizer, args)
    answers = [answer for length in args.lengths for answer in _sit(reader, straw, length, args)]
    rows = [_row(f"{length:,}", [a for a in answers if a["length"] == length]) for length in args.lengths]
    rows += [_row(f"depth {depth}", [a for a in answers if a["depth"] == depth]) for depth in DEPTHS]
    model = {"name": loaded.id, "fingerprint": loaded.fingerprint, "where": str(loaded.folder)}
    return _table(loaded.id, rows), {"model": model, "rows": rows, "answers": answers}


class _Straw:
    """Prose to hide a fact in."""

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        texts = _texts(args)
        self.pieces = [np.array([*tokenizer.encode(f" {text}"), tokenizer.end_id]) for text in texts]

    def draw(self, rng: random.Random, length: int) -> list[int]:
        """`length` tokens, from pieces in random order."""
        out: list[int] = []
        while len(out) < length:
            out += rng.choice(self.pieces).tolist()
        return out[:length]


def _texts(args: argparse.Namespace) -> list[str]:
    if args.data is None:
        return [*lines("replies"), *lines("filler")]
    texts = [d.text for d in documents(args.data, PROSE_FILES) if d.held_out and d.text]
    if not texts:
        raise ConfigError(f"--data {args.data} holds no prose that is kept from training ({PROSE_FILES})")
    return texts


def haystack(straw: Sequence[int], needle: Sequence[int], depth: float) -> list[int]:
    """The straw with the needle at `depth` (0 = before everything, 1 = after it)."""
    at = round(depth * len(straw))
    return [*straw[:at], *needle, *straw[at:]]


def _sit(reader: Reader, straw: _Straw, length: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    loaded = reader.loaded
    examiner = Examiner("dev", args.seed, lambda texts: [len(loaded.tokenizer.encode(f" {t}")) for t in texts])
    places = [(depth, number) for depth in DEPTHS for number in range(args.needles)]
    exams = [examiner.exam(Plan("needle", 1), index) for index in range(len(places))]
    readings, controls = [], []
    for (depth, number), exam in zip(places, exams, strict=True):
        rng = random.Random(f"{args.seed}:{length}:{depth}:{number}")
        asked = loaded.tokenizer.render([{"role": "user", "content": exam.questions[0].text}], True)
        needle = _needle(loaded, exam)
        stack = haystack(straw.draw(rng, max(0, length - len(needle))), needle, depth)
        readings.append(Reading([*stack, *asked], answer=MAX_TOKENS))
        controls.append(Reading(asked, answer=MAX_TOKENS))
    for place, exam, found, guess in zip(places, exams, reader.read(readings), reader.read(controls), strict=True):
        question = exam.questions[0]
        answer, control = _text(loaded, found), _text(loaded, guess)
        yield {
            "length": length, "depth": place[0], "question": question.text, "expected": question.expected,
            "answer": answer, "right": is_right(question, answer), "control_right": is_right(question, control),
        }  # fmt: skip


def _needle(loaded: LoadedModel, exam: Exam) -> list[int]:
    """The telling, acknowledged as in training."""
    messages = [{"role": "user", "content": text} for text in exam.tellings]
    return loaded.tokenizer.render([*messages, {"role": "assistant", "content": "Okay."}], False)


def _text(loaded: LoadedModel, outcome: Outcome) -> str:
    return loaded.tokenizer.decode([t for t in outcome.answer if t != loaded.tokenizer.end_id])


def _row(name: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    right = sum(answer["right"] for answer in answers)
    low, high = wilson(right, len(answers))
    share, control = right / len(answers), sum(answer["control_right"] for answer in answers) / len(answers)
    return {"name": name, "needles": len(answers), "right": right, "share": share, "low": low, "high": high,
            "control_share": control}  # fmt: skip


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    table = [(title, "found, %", "95 %", "control, %", "needles")]
    for row in rows:
        interval = f"{percent(row['low'])} - {percent(row['high'])}"
        table.append((row["name"], percent(row["share"]), interval, percent(row["control_share"]), str(row["needles"])))
    return aligned(table)
