"""Facts whose values are invented words of several tokens: only a memory that copies can answer."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

from nested_runtime.train.dialogues import DialogueSpec, ExhaustedError, Fact, Writer
from nested_runtime.train.phrasing import Relation
from nested_runtime.train.values import words

__all__ = ["InventedWriter", "is_invented"]

KINDS = frozenset({"name", "surname", "place", "country", "invented", "any", "any_name", "word", "animal"})
LISTS = ("names", "surnames", "places", "countries", "nouns", "more_nouns", "animals", "jobs", "hobbies", "adjectives",
         "colors", "foods")  # fmt: skip


@functools.cache
def _listed() -> frozenset[str]:
    return frozenset(word.lower() for name in LISTS for word in words(name))


def is_invented(value: str) -> bool:
    """Whether `value` is one word that no list holds."""
    return value.isalpha() and value.lower() not in _listed()


class InventedWriter(Writer):
    """Writes dialogues in which every value is an invented word of two tokens or more."""

    def __init__(
        self, rng: random.Random, split: str, spec: DialogueSpec, lengths: Callable[[Sequence[str]], list[int]]
    ) -> None:
        super().__init__(rng, split, spec)
        self.lengths = lengths

    def new_fact(self, relation: Relation) -> Fact | None:
        """A fact of a relation that takes such values; None for others."""
        return super().new_fact(relation) if relation.value in KINDS else None

    def new_value(self, relation: Relation) -> str:
        """An invented value that nobody has said in this dialogue."""
        for _ in range(100):
            value = super().new_value(relation)
            if is_invented(value) and self.lengths([value])[0] > 1:
                return value
        raise ExhaustedError(f"no invented value for relation {relation.name!r}")
