"""Which answers are right, and how sure a share of right answers is."""

from __future__ import annotations

import functools
import math
import re

from nested_runtime.evals.exam import Question
from nested_runtime.evals.wording import holds, plain
from nested_runtime.train.dialogues import relations

__all__ = ["is_right", "says_unknown", "wilson"]

CONTRACTIONS = (("don't", "do not"), ("haven't", "have not"), ("didn't", "did not"), ("hasn't", "has not"))
IN_OTHER_WORDS = (
    "you have not mentioned",
    "you did not tell",
    "you did not say",
    "you did not mention",
    "you never told",
    "you never said",
    "you never mentioned",
    "i do not remember",
    "i do not have that",
    "i was not told",
)


def _expanded(text: str) -> str:
    text = plain(text)
    for short, long in CONTRACTIONS:
        text = text.replace(short, long)
    return text


@functools.cache
def denials() -> tuple[str, ...]:
    """How an answer says that it was never told: the openings of the relations' `unknowns`, and some paraphrases."""
    texts = {_expanded(t.text) for relation in relations().values() for t in relation.unknowns}
    openings = {match[0] for text in texts if (match := re.match(r".*? not \w+", text))}
    return (*sorted(openings), *IN_OTHER_WORDS)


def says_unknown(answer: str) -> bool:
    """Whether the answer says that it was not told."""
    text = _expanded(answer)
    return any(denial in text for denial in denials())


def is_right(question: Question, answer: str) -> bool:
    """The newest value and no older one; for what was never told: says so and names no told value."""
    if any(holds(answer, value) for value in question.wrong):
        return False
    return says_unknown(answer) if question.kind == "unknown" else holds(answer, question.expected)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share, by Wilson's score."""
    if not total:
        return 0.0, 1.0
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    reach = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - reach), min(1.0, middle + reach)
