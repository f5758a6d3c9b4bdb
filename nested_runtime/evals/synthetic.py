"""`nested-eval mad` and `nested-eval formal`: HOPE and the controls trained on synthetic tasks, one model a task.

All families of a task read the same sequences in the same order. Formal languages are trained on words of up to 20
letters, short ones first, and judged on those and on longer ones; with chunks of one token HOPE's memories follow every
letter (state tracking): keys, values and gates are then functions of what the letter before left behind.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_runtime.errors import ConfigError
from nested_runtime.evals.report import aligned, percent
from nested_runtime.evals.small_setting import NoCorpus, tokenizer_of
from nested_runtime.evals.tasks import VOCAB, Sizes, Task
from nested_runtime.kernels.denormals import flushed_denormals
from nested_runtime.train.data import Lanes, Session
from nested_runtime.train.trainer import TrainConfig, Trainer

__all__ = ["Study"]

SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "dim": 48, "blocks": 2, "heads": 2, "head_dim": 24, "mlp_ratio": 2}
TEST_SEQUENCES = 512  # of each range of sizes


class TaskLanes(Lanes):
    """Every segment is one sequence of the task, with a fresh memory."""

    def __init__(self, task: Task, sizes: Sizes, trainer: Trainer, seed: int, grows: bool = False) -> None:
        self.task, self.sizes, self.grows = task, sizes, grows
        c = trainer.config
        super().__init__(trainer.corpus, trainer.tokenizer, c.lanes, sizes.length, seed, c.mixture)

    def _new(self) -> Session:
        low, high, _ = self.sizes
        grown = low + round(self.progress * (high - low)) if self.grows else high
        return self.task.session(self.rng, self.sizes._replace(high=max(grown, min(low + 2, high))))


class TaskTrainer(Trainer):
    """A run on one task that keeps nothing on disk."""

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.task, self.sizes = task, task.train
        super().__init__(config, tokenizer_of(VOCAB), NoCorpus(), Path(), 0, 1)

    def fit(self) -> list[float]:
        """Train to the end; the share of answers right for each range of sizes."""
        shares = []
        with flushed_denormals():
            while self.step < self.steps:
                self.train_step()
            for sizes in self.task.test:
                self.sizes = sizes
                shares.append(self.evaluate(TEST_SEQUENCES // self.config.lanes)["dev_value"])
        return shares

    def _train_lanes(self) -> Lanes:
        return TaskLanes(self.task, self.task.train, self, self.config.seed, self.task.grows)

    def _dev_lanes(self) -> Lanes:
        return TaskLanes(self.task, self.sizes, self, 777)


@dataclass(frozen=True)
class Study:
    """One command: its tasks, and the families with the fields that differ from the shape."""

    WHAT: str
    tasks: Mapping[str, Task]
    models: Mapping[str, tuple[str, dict[str, Any]]]
    tokens: int
    lanes: int

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Options of the command."""
        parser.add_argument("--tasks", nargs="+", default=list(self.tasks), metavar="TASK")
        parser.add_argument("--models", nargs="+", default=list(self.models), metavar="MODEL")
        parser.add_argument("--tokens", type=int, default=self.tokens, help=f"of every run (default {self.tokens})")

    def run(self, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
        """Train a model for every task and family; the table and its JSON."""
        for option, known in (("tasks", self.tasks), ("models", self.models)):
            if unknown := [name for name in getattr(args, option) if name not in known]:
                raise ConfigError(f"--{option} {unknown[0]!r} is unknown; known: {', '.join(known)}")
        rows = [self._row(task, model, args) for task in args.tasks for model in args.models]
        return _table(args.command, rows, args.models), {"rows": rows}

    def _row(self, name: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
        task, (family, fields) = self.tasks[name], self.models[model]
        config = TrainConfig(
            family, {**SHAPE, **fields}, tokens=args.tokens, lanes=self.lanes, length=task.train.length,
            lr_other=0.01, warmup=10, curriculum=0.5, bf16=False, seed=args.seed,
        )  # fmt: skip
        shares = TaskTrainer(task, config).fit()
        guess = [_guess(task, sizes, random.Random(1)) for sizes in task.test]
        sizes = [(s.low, s.high) for s in task.test]
        return {"task": name, "model": model, "sizes": sizes, "right": shares, "majority": guess}


def _guess(task: Task, sizes: Sizes, rng: random.Random, draws: int = 500) -> float:
    """What always giving the commonest answer would get."""
    counts: dict[int, int] = {}
    for _ in range(draws):
        session = task.session(rng, sizes)
        for token in session.tokens[session.weights > 0].tolist():
            counts[token] = counts.get(token, 0) + 1
    return max(counts.values()) / sum(counts.values())


def _table(title: str, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    lines = [(title, "sizes", *models, "commonest answer")]
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == name]
        for i, (low, high) in enumerate(mine[0]["sizes"]):
            lines.append(
                (name, f"{low}-{high}", *(percent(row["right"][i]) for row in mine), percent(mine[0]["majority"][i]))
            )
    return aligned(lines)
