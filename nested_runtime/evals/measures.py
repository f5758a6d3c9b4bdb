"""What each command measures, and one `Item` per question asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nested_runtime.evals.exam import Exam, Examiner, Plan, Question
from nested_runtime.evals.scoring import is_right, says_unknown
from nested_runtime.evals.subject import Forced, Progress, Subject, Transcript

__all__ = ["MEASURES", "Item", "measure", "plans"]

MEASURES = {
    "recall": "facts are told, small talk follows, each fact is asked",
    "unknown": "what was never told is asked beside what was: the answer must say so",
    "update": "half of the facts are corrected: the newest value must win and the old one stay away",
    "distance": "one fact; six behind 512 and 4,096 tokens of small talk; twenty in one session",
    "openvocab": "recall of invented words of several tokens",
}


def plans(measure: str, facts: int, filler_tokens: int) -> list[Plan]:
    """The rows of a measure."""
    behind = f", {filler_tokens} tokens of small talk" if filler_tokens else ""
    told = f"{facts} fact{'s' if facts > 1 else ''}{behind}"
    if measure == "distance":
        return [
            Plan("one fact, right after", 1),
            Plan("six facts, 512 tokens between", 6, 512),
            Plan("six facts, 4,096 tokens between", 6, 4096),
            Plan("twenty facts", 20),
        ]
    if measure == "unknown":
        return [Plan(told, facts, filler_tokens, untold=facts)]
    if measure == "update":
        return [Plan(told, facts, filler_tokens, corrected=(facts + 1) // 2)]
    return [Plan(told, facts, filler_tokens, invented=measure == "openvocab")]


@dataclass(frozen=True)
class Item:
    """One question, what was answered, and whether that is right."""

    plan: str
    session: int
    question: Question
    tokens: int  # of the expected value
    answer: str
    right: bool
    denied: bool  # the answer says it was not told
    control: str  # the same question to a memory that was reset
    control_right: bool
    forced: Forced | None


def measure(
    subject: Subject, examiner: Examiner, plan: Plan, sessions: int, *,
    limit: int | None = None, independent: bool = True, progress: Progress = lambda done, total: None,
) -> list[Item]:  # fmt: skip
    """Examine `sessions` sessions, of which at most `limit` questions count."""
    exams = list(_exams(examiner, plan, sessions, limit))
    transcripts = subject.sit(exams, independent=independent, progress=progress)
    return _items(subject, plan, exams, transcripts)[:limit]


def _exams(examiner: Examiner, plan: Plan, sessions: int, limit: int | None) -> Iterator[Exam]:
    asked = 0
    for index in range(sessions):
        if limit is not None and asked >= limit:
            return
        exam = examiner.exam(plan, index)
        asked += len(exam.questions)
        yield exam


def _items(subject: Subject, plan: Plan, exams: Sequence[Exam], transcripts: Sequence[Transcript]) -> list[Item]:
    sizes = iter(subject.lengths([question.expected for exam in exams for question in exam.questions]))
    return [
        Item(
            plan=plan.name,
            session=session,
            question=question,
            tokens=next(sizes),
            answer=answer,
            right=is_right(question, answer),
            denied=says_unknown(answer),
            control=control,
            control_right=is_right(question, control),
            forced=forced,
        )
        for session, (exam, script) in enumerate(zip(exams, transcripts, strict=True))
        for question, answer, control, forced in zip(
            exam.questions, script.answers, script.controls, script.forced, strict=True
        )
    ]
