"""Synthetic tasks: every answer follows from what stands before it; small models of every kind learn one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nested_runtime.evals import formal, mad
from nested_runtime.evals.cli import main
from nested_runtime.evals.synthetic import TaskTrainer
from nested_runtime.evals.tasks import ASK, FORMAL, MAD, NO, PAD, VOCAB, YES, A, B, Task
from nested_runtime.train.trainer import TrainConfig

TASKS = {**MAD, **FORMAL}
SHAPE = {"vocab_size": VOCAB, "dim": 16, "blocks": 1, "heads": 2, "head_dim": 8}


@pytest.mark.parametrize("name", TASKS)
def test_sequences_are_as_long_as_said_and_hold_answers(name: str) -> None:
    task = TASKS[name]
    for sizes in (task.train, *task.test):
        for seed in range(30):
            session = task.session(random.Random(seed), sizes)
            assert len(session.tokens) == len(session.weights) == sizes.length + 1
            assert session.tokens.max() < VOCAB
            assert (session.weights > 0).any()
            assert session.weights[0] == 0


def draw(task: Task, seed: int, size: int) -> tuple[list[int], list[int]]:
    return task.draw(random.Random(seed), size)


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_verdicts_are_true(size: int) -> None:
    seen = set()
    for seed in range(30):
        for name, is_in in (
            ("parity", lambda word: word.count(B) % 2 == 0),
            ("(aa)*", lambda word: len(word) % 2 == 0),
            ("anbn", lambda word: word == [A] * (len(word) // 2) + [B] * (len(word) // 2)),
        ):
            tokens, (at,) = draw(FORMAL[name], seed, size)
            assert tokens[at - 1] == ASK
            assert tokens[at] == (YES if is_in(tokens[: at - 1]) else NO)
            seen.add((name, tokens[at]))
    assert {("parity", YES), ("parity", NO), ("anbn", YES), ("anbn", NO)} <= seen


def test_only_counting_tells_words_of_anbn() -> None:
    """Words of both answers are as long, and often one letter apart."""
    words = [draw(FORMAL["anbn"], seed, 12)[0] for seed in range(60)]
    assert {len(word) for word in words} == {14}
    assert {word.count(A) for word in words if word[-1] == YES} == {6}
    assert {5, 7} < {word.count(A) for word in words if word[-1] == NO}


def test_words_grow_while_a_model_is_trained() -> None:
    task = FORMAL["parity"]
    config = TrainConfig("delta", SHAPE, tokens=10_000, lanes=16, length=task.train.length, bf16=False)
    lanes = TaskTrainer(task, config).lanes

    def longest(progress: float) -> int:
        lanes.progress = progress
        lanes.next()  # drawn before
        drawn = [lanes.next().tokens for _ in range(20)]
        return max(int(((tokens == A) | (tokens == B)).sum(1).max()) for tokens in drawn)

    assert [longest(progress) for progress in (0.0, 0.5, 1.0)] == [3, 11, 20]


@pytest.mark.parametrize("size", [2, 8, 15])
def test_copies_are_what_was_read(size: int) -> None:
    for seed in range(20):
        tokens, at = draw(MAD["recall"], seed, size)
        values = dict(zip(tokens[0 : 2 * size : 2], tokens[1 : 2 * size : 2], strict=True))
        assert [tokens[i] for i in at] == [values[tokens[i - 1]] for i in at]
        tokens, at = draw(MAD["selective-copy"], seed, size)
        assert [tokens[i] for i in at] == [t for t in tokens[: at[0] - 1] if t != PAD]
        tokens, at = draw(MAD["compression"], seed, size)
        places = sorted(tokens[i - 1] for i in at)
        assert [tokens[i] for i in at] == [tokens[places.index(tokens[i - 1])] for i in at]


def test_mad_prints_every_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["mad", "--tasks", "recall", "--models", "delta", "hope", "--tokens", "2048", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    body = json.loads(path.read_text(encoding="utf-8"))
    assert "commonest answer" in capsys.readouterr().out
    assert [row["model"] for row in body["rows"]] == ["delta", "hope"]
    assert all(len(row["right"]) == 2 and all(0 <= share < 0.1 for share in row["majority"]) for row in body["rows"])


@pytest.mark.parametrize("study", [mad.STUDY, formal.STUDY], ids=["mad", "formal"])
def test_the_models_of_a_study_can_be_built(study: object) -> None:
    for family, fields in study.models.values():  # type: ignore[attr-defined]
        for task in study.tasks.values():  # type: ignore[attr-defined]
            for sizes in (task.train, *task.test):
                TrainConfig(family, {**SHAPE, **fields}, length=sizes.length).build()


def test_a_memory_learns_recall() -> None:
    """The delta rule passes guessing by far after a minute of a slow core; what is judged was never trained on."""
    shape = {"vocab_size": VOCAB, "dim": 48, "blocks": 2, "heads": 2, "head_dim": 24, "mlp_ratio": 2}
    task = MAD["recall"]
    config = TrainConfig(
        "delta", shape, tokens=100_000, lanes=16, length=task.train.length, lr_other=0.01, warmup=10, bf16=False
    )
    assert TaskTrainer(task, config).fit()[0] > 0.5
