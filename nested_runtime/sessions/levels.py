"""What the memory levels of a session hold: sizes, norms, and the clocks of those that learn while serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nested_runtime.memory.cms import level_name
from nested_runtime.memory.level import Level
from nested_runtime.models.adaptation import read_clock
from nested_runtime.state.spec import TensorSpec

__all__ = ["Clock", "LevelReport", "measure"]

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Clock:
    """Where an adaptive level stands.

    tokens_since_update   session tokens read since its last step, or its last try; it steps after `level.chunk`
    updates, refused      steps taken, and steps that diverged and were not taken
    """

    level: Level
    tokens_since_update: int
    updates: int
    refused: int


@dataclass(frozen=True)
class LevelReport:
    """One memory level of a session.

    norm    of all its tensors; of an adaptive level, of its delta to the learned start
    clock   None = a level that changes with every token
    """

    name: str
    tensors: int
    bytes: int
    norm: float
    clock: Clock | None = None


def measure(specs: Sequence[TensorSpec], levels: Sequence[Level], tensors: Tensors) -> list[LevelReport]:
    """The levels of a state, fastest first; `levels` are the model's adaptive ones."""
    clocks = {level_name(n): Clock(level, *read_clock(tensors, n)) for n, level in enumerate(levels)}
    reports = []
    for name in dict.fromkeys(spec.level for spec in specs):
        own = {spec.name: tensors[spec.name] for spec in specs if spec.level == name}
        clock = clocks.get(name)
        learned = {n: t for n, t in own.items() if ".delta." in n} if clock is not None else own
        norm = sum(float(tensor.double().square().sum()) for tensor in learned.values()) ** 0.5
        reports.append(LevelReport(name, len(own), sum(tensor.nbytes for tensor in own.values()), norm, clock))
    return reports
