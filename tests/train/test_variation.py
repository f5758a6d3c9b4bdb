"""Other words for the same: values and people stay, measured phrasings stay."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.train.dialogues import Writer, generate, stage
from nested_runtime.train.values import lines
from nested_runtime.train.variation import vary

VARIED = replace(stage(1.0), p_varied=1.0)


def test_synonyms_are_pairs_of_different_phrases() -> None:
    for line in lines("synonyms"):
        first, *others = line.split("|")
        assert others, line
        assert first == first.lower(), line
        assert first not in others, line


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_answers_still_hold_a_value_that_was_told(seed: int) -> None:
    dialogue = generate(random.Random(seed), "train", VARIED)
    for probe in dialogue.probes:
        if probe.expected:
            told = " ".join(m.content for m in dialogue.messages[: probe.turn] if m.role == "user").lower()
            assert probe.expected.lower() in told


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_only_training_varies(split: str) -> None:
    """Of the sentences of other splits every literal stays; those of training mostly change."""
    writer = Writer(random.Random(7), split, VARIED)
    literals = ["What is the name of my ", "?"]
    changed = sum(writer.vary(list(literals)) != literals for _ in range(100))
    assert changed > 50 if split == "train" else changed == 0


def test_words_do_change() -> None:
    rng = random.Random(0)
    said = {"|".join(vary(["My dog is called ", "."], rng)) for _ in range(200)}
    assert len(said) > 20
