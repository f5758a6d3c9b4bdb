"""Synthetic tasks that a model is trained on: after MAD (2403.17844) and formal languages (2207.02098).

A task draws one sequence of exactly `length` + 1 tokens, the answers weighted 3 and all else 0. Random tokens make
copying from memory the only solution; formal languages make counting or one bit of state the only one.

    recall            keys and values, then every key again with its value to be said
    selective-copy    few tokens scattered in noise, to be repeated in order
    compression       random tokens are read, then said again for shuffled places (MAD's task has a decoder instead)
    parity            a string of 0 and 1: is the number of ones even?
    (aa)*             a^n: is it in (aa)*?
    anbn              a^n b^m: is n = m?
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from nested_runtime.train.data import Session
from nested_runtime.train.messages import Weights

__all__ = ["FORMAL", "MAD", "VOCAB", "Task"]

VOCAB = 64
PAD, ASK, NO, YES, A, B = 0, 1, 2, 3, 4, 5
FIRST = 8  # of the random tokens


class Task(NamedTuple):
    """draw(rng, size) -> tokens and the positions of answers; `size` grows with difficulty. `test`: sizes judged on."""

    draw: Callable[[random.Random, int], tuple[list[int], list[int]]]
    length: int
    train: tuple[int, int]  # sizes drawn in training
    test: tuple[tuple[int, int], ...]  # ranges of sizes

    def session(self, rng: random.Random, sizes: tuple[int, int]) -> Session:
        """One sequence, padded in front."""
        tokens, answers = self.draw(rng, rng.randint(*sizes))
        front = self.length + 1 - len(tokens)
        weights = np.zeros(self.length + 1, dtype=np.float32)
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
    """Half of the words are in the language; the others miss it by one or more."""
    n = max(1, size // 2)
    m = n if rng.random() < 0.5 else rng.choice([i for i in range(1, 2 * n + 2) if i != n])
    return _verdict([A] * n + [B] * m, m == n)


MAD: Mapping[str, Task] = {
    "recall": Task(_recall, 64, (2, 16), ((2, 8), (9, 16))),
    "selective-copy": Task(_selective_copy, 64, (2, 15), ((2, 8), (9, 15))),
    "compression": Task(_compression, 64, (2, 20), ((2, 10), (11, 20))),
}
FORMAL: Mapping[str, Task] = {
    "parity": Task(_parity, 64, (1, 20), ((1, 20), (21, 40))),
    "(aa)*": Task(_aa, 64, (1, 20), ((1, 20), (21, 40))),
    "anbn": Task(_anbn, 64, (2, 20), ((2, 20), (21, 40))),
}
