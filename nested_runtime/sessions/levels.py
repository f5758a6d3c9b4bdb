"""What the memory levels of a session hold: sizes, norms, clocks, and how far they moved from the version before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nested_runtime.memory.cms import level_name
from nested_runtime.memory.level import Level
from nested_runtime.models.adaptation import read_clock
from nested_runtime.state.spec import TensorSpec

__all__ = ["Clock", "LevelReport", "Part", "measure"]

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
class Part:
    """What one level has learned in one place of the model ("blocks.2"). Norms as in `LevelReport`."""

    name: str
    norm: float
    change: float | None


@dataclass(frozen=True)
class LevelReport:
    """One memory level of a session.

    tensors, bytes   all it keeps, buffers included
    norm    Frobenius norm of what it has learned (`LanguageModel.memory`): sqrt(sum x^2); 0 = fresh
    change  the same of the difference to the state it was made from; None = that one is not known
    parts   the same of each block
    clock   None = a level that changes with every token
    """

    name: str
    tensors: int
    bytes: int
    norm: float
    change: float | None
    parts: tuple[Part, ...]
    clock: Clock | None = None


def measure(
    specs: Sequence[TensorSpec],
    levels: Sequence[Level],
    memory: Callable[[Tensors], Tensors],
    state: Tensors,
    before: Tensors | None,
) -> list[LevelReport]:
    """The levels of a state, fastest first; `levels` are the model's adaptive ones, `before` the state it came from."""
    clocks = {level_name(n): Clock(level, *read_clock(state, n)) for n, level in enumerate(levels)}
    now = _alone(memory, state)
    then = None if before is None else _alone(memory, before)
    reports = []
    for name in dict.fromkeys(spec.level for spec in specs):
        own = [spec for spec in specs if spec.level == name]
        learned = [spec for spec in own if spec.name in now]
        places = dict.fromkeys(_place(spec.name) for spec in learned)
        parts = [(place, [spec for spec in learned if _place(spec.name) == place]) for place in places]
        reports.append(
            LevelReport(
                name=name,
                tensors=len(own),
                bytes=sum(state[spec.name].nbytes for spec in own),
                norm=_norm(learned, now),
                change=_change(learned, now, then),
                parts=tuple(Part(place, _norm(some, now), _change(some, now, then)) for place, some in parts),
                clock=clocks.get(name),
            )
        )
    return reports


def _alone(memory: Callable[[Tensors], Tensors], state: Tensors) -> Tensors:
    """`memory` of one session."""
    batch = {name: tensor[None] for name, tensor in state.items()}
    with torch.inference_mode():
        return {name: tensor[0] for name, tensor in memory(batch).items()}


def _place(name: str) -> str:
    """Where in the model a tensor lies: its block, else the first word of its name."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]


def _norm(specs: Sequence[TensorSpec], state: Tensors) -> float:
    return math.sqrt(sum(_squares(state[spec.name]) for spec in specs))


def _change(specs: Sequence[TensorSpec], state: Tensors, before: Tensors | None) -> float | None:
    if before is None:
        return None
    squares = [_moved(spec, state[spec.name], before[spec.name]) for spec in specs]
    known = [one for one in squares if one is not None]
    return math.sqrt(sum(known)) if len(known) == len(squares) else None


def _moved(spec: TensorSpec, after: torch.Tensor, before: torch.Tensor) -> float | None:
    """Squares of the difference; of a growing tensor those of the rows that came, None if old rows were dropped."""
    if not spec.grows:
        return _squares(after.double() - before.double())
    if len(after) < len(before) or not torch.equal(after[: len(before)], before):
        return None
    return _squares(after[len(before) :])


def _squares(tensor: torch.Tensor) -> float:
    return float(torch.sum(tensor.double() ** 2))
