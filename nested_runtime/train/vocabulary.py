"""Training of the byte-level BPE vocabulary."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from nested_runtime.tokenizer import SPECIAL, Tokenizer
from nested_runtime.train.dialogues import copy_drill, generate, stage

__all__ = ["train_tokenizer"]


def _dialogue_texts(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for i in range(count):
        dialogue = copy_drill(rng, "train") if i % 4 == 0 else generate(rng, "train", stage(rng.random()))
        yield "\n".join(f" {m.content}" for m in dialogue.messages)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, dialogues: int = 12000, seed: int = 0) -> Tokenizer:
    """BPE over bytes; digits stand alone so that numbers split predictably."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def chain() -> Iterator[str]:
        yield from texts
        yield from _dialogue_texts(dialogues, seed)

    backend.train_from_iterator(chain(), trainer)
    return Tokenizer(backend)
