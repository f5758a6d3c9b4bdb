"""Shares and intervals, rows and breakdowns; a scripted subject that knows or forgets everything checks the sums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nested_runtime.evals import report
from nested_runtime.evals.exam import Exam, Examiner
from nested_runtime.evals.measures import MEASURES, Item, measure, plans
from nested_runtime.evals.scoring import wilson
from nested_runtime.evals.subject import Forced, Progress, Transcript


class Scripted:
    """Answers as training would have it, or always says the same; its control never knows."""

    name, fingerprint, where = "scripted", "0", "here"

    def __init__(self, always: str | None = None) -> None:
        self.always = always

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def sit(self, exams: Sequence[Exam], *, independent: bool, progress: Progress) -> list[Transcript]:
        return [self.script(exam) for exam in exams]

    def script(self, exam: Exam) -> Transcript:
        answers = tuple(self.always or question.reference.content for question in exam.questions)
        forced = tuple(Forced((True, False), (False, False)) for _ in answers)
        return Transcript(("Okay.",) * len(exam.tellings), answers, ("I am a bot.",) * len(answers), forced)


def items_of(subject: Scripted, name: str, sessions: int = 4, limit: int | None = None) -> list[Item]:
    examiner = Examiner("dev", 0, subject.lengths)
    return [i for plan in plans(name, 4, 0) for i in measure(subject, examiner, plan, sessions, limit=limit)]


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 100, 0.0, 0.0370), (8, 10, 0.4902, 0.9433), (100, 100, 0.9630, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("name", sorted(set(MEASURES) - {"openvocab"}))
def test_who_knows_everything_is_right_and_its_control_is_not(name: str) -> None:
    for row in report.rows(items_of(Scripted(), name)):
        body = row.body()
        assert body["right"] == body["questions"] > 0
        assert body["control_right"] == 0
        assert (body["first_token"], body["value_tokens"], body["first_token_control"]) == (1.0, 0.5, 0.0)


def test_the_rows_of_every_measure() -> None:
    names = {name: [row.name for row in report.rows(items_of(Scripted(), name))] for name in sorted(MEASURES)[:1]}
    assert names == {
        "distance": [
            "one fact, right after",
            "six facts, 512 tokens between",
            "six facts, 4,096 tokens between",
            "twenty facts",
        ]
    }
    assert {r.name for r in report.rows(items_of(Scripted(), "update"))} == {"4 facts", "4 facts: corrected"}
    unknown = report.rows(items_of(Scripted("I don't know."), "unknown"))
    shares = {row.name: (row.body()["share"], row.body()["says_unknown"]) for row in unknown}
    assert shares == {"4 facts": (0.0, 1.0), "4 facts: never told": (1.0, 1.0)}


def test_limit_counts_questions() -> None:
    assert len(items_of(Scripted(), "recall", limit=6)) == 6


def test_breakdowns_cover_what_was_told() -> None:
    items = items_of(Scripted(), "unknown", sessions=8)
    told = sum(item.question.kind != "unknown" for item in items)
    for rows in report.breakdown(items).values():
        assert sum(len(row.items) for row in rows) == told


def test_table_is_aligned_and_the_file_holds_every_question(tmp_path: Path) -> None:
    items = items_of(Scripted(), "recall")
    lines = report.table("recall", report.rows(items)).splitlines()
    assert len({len(line) for line in lines}) == 1
    path = tmp_path / "deep" / "recall.json"
    report.write(path, {"items": [report.item_body(item) for item in items]})
    read = json.loads(path.read_text(encoding="utf-8"))["items"]
    assert [one["expected"] for one in read] == [item.question.expected for item in items]
    assert all(one["right"] and one["question"] and one["answer"] for one in read)
    assert list(path.parent.iterdir()) == [path]
