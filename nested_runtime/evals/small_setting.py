"""The trainer's small setting: models of 40,000 parameters that begin to learn associative recall in 70 steps.

It is `train.trainer.Trainer` on sessions of another kind: rounds of keys with values of two tokens, noise, a third of
the keys told again with another value, then every key asked. Memory is carried from segment to segment, so earlier
rounds are in the way. Equal seeds give every model the same tokens in the same order. The generator's dialogues
instead, or as 20 % of the sessions, are not learned in so few tokens (docs/log.md).
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nested_runtime.kernels.denormals import flushed_denormals
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import Corpus, Lanes, Session
from nested_runtime.train.messages import Weights
from nested_runtime.train.trainer import TrainConfig, Trainer
from nested_runtime.train.vocabulary import train_tokenizer

__all__ = ["SHAPE", "NoCorpus", "SmallTrainer", "recall_round", "small_config", "tokenizer_of"]

VOCAB, SPECIAL = 64, 5
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "dim": 64, "blocks": 1, "heads": 2, "head_dim": 32, "mlp_ratio": 2}
LANES, LENGTH = 8, 128
SEGMENTS = 2  # of a session
DEV_SEED = 777


def recall_round(rng: random.Random) -> Session:
    """One round: 4 to 10 keys, each with a value of two tokens; the tokens of asked values count."""
    keys = rng.sample(range(SPECIAL, VOCAB), rng.randint(4, 10))
    tokens: list[int] = []
    weights: list[float] = []

    def say(words: list[int], weight: float) -> None:
        tokens.extend(words)
        weights.extend([weight] * len(words))

    def draw(count: int) -> list[int]:
        return [rng.randrange(SPECIAL, VOCAB) for _ in range(count)]

    told: dict[int, list[int]] = {}
    for key in [*keys, *rng.sample(keys, len(keys) // 3)]:
        told[key] = draw(2)
        say([key, *told[key], *draw(rng.randint(0, 2))], 0.0)
    say(draw(rng.randint(0, 24)), 0.0)
    for key in rng.sample(keys, len(keys)):
        say([key], 0.0)
        say(told[key], Weights.value)
    return Session(np.array(tokens, dtype=np.uint16), np.array(weights, dtype=np.float32))


class RecallLanes(Lanes):
    """Lanes whose sessions are rounds of recall, `SEGMENTS` segments long."""

    def _new(self) -> Session:
        size, tokens, weights = SEGMENTS * self.length + 1, np.empty(0, np.uint16), np.empty(0, np.float32)
        while len(tokens) < size:
            one = recall_round(self.rng)
            tokens, weights = np.concatenate([tokens, one.tokens]), np.concatenate([weights, one.weights])
        return Session(tokens[:size], weights[:size])


class NoCorpus(Corpus):
    """Nothing is read: the sessions are drawn."""

    def __init__(self) -> None:
        self.prose, self.chats, self.small_talk = [], [], []


@cache
def tokenizer_of(vocab_size: int) -> Tokenizer:
    """The trainer wants one; tokens are drawn without it."""
    return train_tokenizer((), vocab_size, dialogues=40)


def small_config(family: str, fields: dict[str, Any], tokens: int, seed: int) -> TrainConfig:
    """A run of `tokens` tokens; `fields` are added to the shape."""
    return TrainConfig(
        family, {**SHAPE, **fields}, tokens=tokens, lanes=LANES, length=LENGTH, lr_other=0.01, warmup=10, bf16=False,
        seed=seed,
    )  # fmt: skip


class SmallTrainer(Trainer):
    """A run that keeps nothing on disk."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config, tokenizer_of(VOCAB), NoCorpus(), Path(), 0, 1)

    def fit(self, eval_steps: int = 24) -> dict[str, float]:
        """Train to the end; loss and share of value tokens right on sessions drawn with another seed."""
        with flushed_denormals():
            while self.step < self.steps:
                self.train_step()
            return self.evaluate(eval_steps)

    def _train_lanes(self) -> Lanes:
        return self._recall(self.config.seed)

    def _dev_lanes(self) -> Lanes:
        return self._recall(DEV_SEED)

    def _recall(self, seed: int) -> Lanes:
        c = self.config
        return RecallLanes(self.corpus, self.tokenizer, c.lanes, c.length, seed, c.mixture)
