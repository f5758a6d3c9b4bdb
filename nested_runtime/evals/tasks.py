"""Synthetic tasks that a model is trained on: after MAD (2403.17844) and formal languages (2207.02098).

A task draws one sequence of a given length, the answers weighted 3 and all else 0. Random tokens make copying from
memory the only solution; formal languages make counting or one bit of state the only one.

    recall            keys and values, then every key again with its value to be said
    selective-copy    few tokens scattered in noise, to be repeated in order
    compression       random tokens are read, then said again for shuffled places (MAD's task has a decoder instead)
    parity            a string of 0 and 1: is the number of ones even?
    (aa)*             a^n: is it in (aa)*?
    anbn              a^n b^m: is n = m? Words of both answers are as long; most wrong ones miss by a letter
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from nested_runtime.train.data import Session
from nested_runtime.train.messages import Weights

__all__ = ["FORMAL", "MAD", "VOCAB", "Sizes", "Task"]

VOCAB = 64
PAD, ASK, NO, YES, A, B = 0, 1, 2, 3, 4, 5
FIRST = 8  # of the random tokens


class Sizes(NamedTuple):
    """Sizes from `low` to `high`, in sequences of `length` tokens and one that is only predicted."""

    low: int
    high: int
    length: int


class Task(NamedTuple):
    """draw(rng, size) -> tokens and the positions of answers; `size` grows with difficulty."""

    draw: Callable[[random.Random, int], tuple[list[int], list[int]]]
    train: Sizes
    test: tuple[Sizes, ...]
    grows: bool = False  # training begins with small sizes

    def session(self, rng: random.Random, sizes: Sizes) -> Session:
        """One sequence, padded in front."""
        tokens, answers = self.draw(rng, rng.randint(sizes.low, sizes.high))
        front = sizes.length + 1 - len(tokens)
        weights = np.zeros(sizes.length + 1, dtype=np.float32)
        weights[[front + at for at in answers]] = Weights.value
        return Session(np.array([PAD] * front + tokens, dtype=np.uint16), weights)


def _any(rng: random.Random) -> int:
    return rng.randrange(FIRST, VOCAB)


def _recall(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    keys = rng.sample(range(FIRST, VOCAB), size)
    values = {key: _any(rng) for key in keys}
    told = [token for key in keys for token in (key, values[key])]
    asked = [token for key in rng.sample(keys, size) for token in (key, values[key])]
    start = len(told)
    return told + asked, list(range(start + 1, start + len(asked), 2))


def _selective_copy(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    """Noise is one token (PAD), as in MAD; the tokens to keep stand anywhere in it."""
    kept = [_any(rng) for _ in range(size)]
    places = sorted(rng.sample(range(3 * size), size))
    noisy = [PAD] * (3 * size)
    for at, token in zip(places, kept, strict=True):
        noisy[at] = token
    start = len(noisy) + 1
    return [*noisy, ASK, *kept], list(range(start, start + size))


def _compression(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    """Place i is named by the i-th token of the vocabulary's end, so places and contents do not overlap."""
    half = (FIRST + VOCAB) // 2
    contents = [rng.randrange(FIRST, half) for _ in range(size)]
    asked = [token for i in rng.sample(range(size), size) for token in (half + i, contents[i])]
    start = size + 1
    return [*contents, ASK, *asked], list(range(start + 1, start + len(asked), 2))


def _verdict(word: list[int], accepted: bool) -> tuple[list[int], list[int]]:
    return [*word, ASK, YES if accepted else NO], [len(word) + 1]


def _parity(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    word = [rng.choice((A, B)) for _ in range(size)]
    return _verdict(word, word.count(B) % 2 == 0)


def _aa(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    return _verdict([A] * size, size % 2 == 0)


def _anbn(rng: random.Random, size: int) -> tuple[list[int], list[int]]:
    """Half of the words are in the language; of the others at least half miss it by one letter."""
    half = (size + 1) // 2
    n, accepted = half, rng.random() < 0.5
    if not accepted:
        near = rng.random() < 0.5
        n = rng.choice((half - 1, half + 1) if near else [i for i in range(2 * half + 1) if i != half])
    return _verdict([A] * n + [B] * (2 * half - n), accepted)


def _formal(draw: Callable[[random.Random, int], tuple[list[int], list[int]]]) -> Task:
    """Trained on words of up to 20 letters, judged on words of up to four times as many."""
    return Task(draw, Sizes(1, 20, 24), (Sizes(1, 20, 24), Sizes(21, 40, 48), Sizes(41, 80, 88)), grows=True)


MAD: Mapping[str, Task] = {
    "recall": Task(_recall, Sizes(2, 16, 64), (Sizes(2, 8, 64), Sizes(9, 16, 64))),
    "selective-copy": Task(_selective_copy, Sizes(2, 15, 64), (Sizes(2, 8, 64), Sizes(9, 15, 64))),
    "compression": Task(_compression, Sizes(2, 20, 64), (Sizes(2, 10, 64), Sizes(11, 20, 64))),
}
FORMAL: Mapping[str, Task] = {"parity": _formal(_parity), "(aa)*": _formal(_aa), "anbn": _formal(_anbn)}
