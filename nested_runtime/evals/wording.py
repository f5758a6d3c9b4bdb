"""Whether a value stands in what was said."""

from __future__ import annotations

import re

from nested_runtime.train.dialogues import mentions

__all__ = ["holds", "plain"]


def plain(text: str) -> str:
    """Small letters, straight apostrophes, single blanks."""
    return re.sub(r"\s+", " ", text.replace("’", "'").lower()).strip()


def holds(answer: str, value: str) -> bool:
    """Whether `value`, without its indefinite article, stands in `answer` as whole words; case does not count."""
    return mentions(plain(answer), re.sub(r"^an? ", "", plain(value)))
