"""The trainer's small setting: models of 0.1M parameters, a vocabulary of 512, no data folder.

It is `train.trainer.Trainer` on two kinds of sessions: associative recall over random tokens, where some keys get a new
value before they are asked, and the generator's short memory dialogues. Equal seeds give every model the same tokens in
the same order. Models are judged on both kinds apart, on draws, phrasings and values that training never makes.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import KINDS, Corpus, Lanes, Mixture, Session
from nested_runtime.train.messages import Weights
from nested_runtime.train.trainer import TrainConfig, Trainer
from nested_runtime.train.values import lines
from nested_runtime.train.vocabulary import train_tokenizer

__all__ = ["SHAPE", "SmallTrainer", "recall_session", "small_config", "small_tokenizer"]

VOCAB, SPECIAL = 512, 5
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "dim": 64, "blocks": 2, "heads": 2, "head_dim": 32, "mlp_ratio": 2}
LENGTH = 128  # tokens of a segment
RECALL_SHARE = 0.6  # of the sessions
DIALOGUES = dict.fromkeys(KINDS, 0.0) | {"pairs": 0.4, "dialogue": 0.6}
JUDGED = {"recall": 1.0, "dialogue": 0.0}  # what is measured, and the share of recall in it
DEV_SEED = 777


@cache
def small_tokenizer() -> Tokenizer:
    """512 entries, trained on generated dialogues."""
    return train_tokenizer((), VOCAB, dialogues=400)


def recall_session(rng: random.Random) -> Session:
    """Keys with values of two tokens; noise; a third of the keys get another value; every key is asked, shuffled."""
    keys = rng.sample(range(SPECIAL, VOCAB), rng.randint(4, 10))
    tokens: list[int] = []
    weights: list[float] = []

    def say(words: list[int], weight: float) -> None:
        tokens.extend(words)
        weights.extend([weight] * len(words))

    def noise(most: int) -> None:
        say([rng.randrange(SPECIAL, VOCAB) for _ in range(rng.randint(0, most))], 0.0)

    told: dict[int, list[int]] = {}
    changed = rng.sample(keys, len(keys) // 3)
    for key in [*keys, *changed]:
        told[key] = [rng.randrange(SPECIAL, VOCAB) for _ in range(2)]
        say([key, *told[key]], 0.0)
        noise(2)
    noise(24)
    for key in rng.sample(keys, len(keys)):
        say([key], 0.0)
        say(told[key], Weights.value)
    return Session(np.array(tokens, dtype=np.uint16), np.array(weights, dtype=np.float32))


class SmallLanes(Lanes):
    """Lanes of the two kinds of sessions, `recall` being the share of associative recall."""

    def __init__(self, recall: float, *args: Any, **options: Any) -> None:
        self.recall = recall
        super().__init__(*args, **options)

    def _draw(self) -> Session:
        return recall_session(self.rng) if self.rng.random() < self.recall else super()._draw()


class GeneratedTalk(Corpus):
    """Small talk from the word lists of the dialogue generator instead of a data folder."""

    def __init__(self, tokenizer: Tokenizer, count: int = 200) -> None:
        rng, replies = random.Random(0), lines("replies")
        pairs = [(rng.choice(replies), rng.choice(replies)) for _ in range(count)]
        self.small_talk = [[pair] for pair in pairs]
        self.chats = [np.array(self._ids(tokenizer, pair), dtype=np.uint16) for pair in pairs]
        self.prose = self.chats

    def _ids(self, tokenizer: Tokenizer, pair: tuple[str, str]) -> list[int]:
        messages = ({"role": r, "content": c} for r, c in zip(("user", "assistant"), pair, strict=True))
        return tokenizer.render(messages, add_generation_prompt=False)


def small_config(family: str, fields: dict[str, Any], tokens: int, seed: int, lanes: int = 16) -> TrainConfig:
    """A run of `tokens` tokens; `fields` are added to the shape."""
    mixture = Mixture(DIALOGUES, DIALOGUES, DIALOGUES)
    return TrainConfig(
        family, {**SHAPE, **fields}, tokens=tokens, lanes=lanes, length=LENGTH, warmup=10, bf16=False, seed=seed,
        mixture=mixture,
    )  # fmt: skip


class SmallTrainer(Trainer):
    """A run that keeps nothing on disk."""

    def __init__(self, config: TrainConfig) -> None:
        tokenizer = small_tokenizer()
        super().__init__(config, tokenizer, GeneratedTalk(tokenizer), Path(), 0, 1)
        self.judged = RECALL_SHARE
        self.lanes = self._small_lanes(RECALL_SHARE, config.seed)

    def _small_lanes(self, recall: float, seed: int, split: str = "train") -> SmallLanes:
        c = self.config
        return SmallLanes(recall, self.corpus, self.tokenizer, c.lanes, c.length, seed, c.mixture, split, progress=0.3)

    def _dev_lanes(self) -> Lanes:
        return self._small_lanes(self.judged, DEV_SEED, "dev")

    def fit(self, eval_steps: int = 16) -> dict[str, float]:
        """Train to the end; loss and share of value tokens right, for each kind of session."""
        torch.set_flush_denormal(True)
        while self.step < self.steps:
            self.train_step()
        figures = {}
        for name, self.judged in JUDGED.items():
            found = self.evaluate(eval_steps)
            figures |= {f"{name}_loss": found["dev_loss"], f"{name}_right": found["dev_value"]}
        return figures
