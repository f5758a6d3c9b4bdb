"""The seam between exams and who sits them: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nested_runtime.evals.exam import Exam

__all__ = ["MAX_TOKENS", "Forced", "Progress", "Subject", "Transcript"]

MAX_TOKENS = 40  # of every reply and answer; all are greedy
Progress = Callable[[int, int], None]  # sessions done, of how many


@dataclass(frozen=True)
class Forced:
    """The value tokens of a reference answer, each predicted from the ones before: was the likeliest token right?"""

    hits: tuple[bool, ...]
    control: tuple[bool, ...]  # the same with a memory that was reset: what guessing gives


@dataclass(frozen=True)
class Transcript:
    """What came back: replies to the tellings, then by question the answer, the control's, and forced predictions."""

    replies: tuple[str, ...]
    answers: tuple[str, ...]
    controls: tuple[str, ...]  # the same questions, alone, to a memory that was reset
    forced: tuple[Forced | None, ...]  # None where a subject cannot tell


class Subject(Protocol):
    """Somebody with a memory per session."""

    name: str
    fingerprint: str
    where: str  # folder or URL

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as the content of a message."""

    def sit(self, exams: Sequence[Exam], *, independent: bool, progress: Progress) -> list[Transcript]:
        """Sit all exams, each in a session of its own.

        independent: every question meets the memory as it was after the small talk; otherwise questions and answers
        enter the memory one after the other.
        """
