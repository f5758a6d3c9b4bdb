"""Continuum memory system (NL Eq. 70-74): a chain of MLP levels, fastest first, each with its own update frequency.

Level l keeps its weights for C_l tokens of the session. C_l = 0 (never) is a static MLP; a chain of one such level is
a transformer block's MLP. Sequential chain (NL Eq. 73): y = MLP_k(... MLP_1(z)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import linear, relu

from nested_runtime.errors import ConfigError

__all__ = ["ContinuumMemory", "Level", "LevelClock"]


@dataclass(frozen=True)
class Level:
    """One level: `hidden` width, `chunk` C_l in session tokens between updates (0 = never)."""

    name: str
    hidden: int
    chunk: int = 0


class LevelClock:
    """Which levels are due at a session position. Levels are ordered fastest first; C_l divides C_{l+1}."""

    def __init__(self, levels: Sequence[Level]) -> None:
        for level in levels:
            if level.chunk < 0:
                raise ConfigError(
                    f"levels.{level.name}.chunk must be 0 (never) or a number of tokens, got {level.chunk}"
                )
        chunks = [level.chunk for level in levels if level.chunk]
        for fast, slow in pairwise(chunks):
            if slow % fast:
                raise ConfigError(f"levels: chunk {fast} does not divide the next level's chunk {slow}")
        self.levels = tuple(levels)

    def due(self, position: int) -> tuple[Level, ...]:
        """Levels that take a step when the session has read exactly `position` tokens."""
        return tuple(level for level in self.levels if level.chunk and position and position % level.chunk == 0)

    def until_due(self, position: int) -> int | None:
        """Tokens the session may read from `position` before some level is due; None when all are static."""
        left = [level.chunk - position % level.chunk for level in self.levels if level.chunk]
        return min(left, default=None)


class ContinuumMemory(nn.Module):
    """The chain of one block. Each level is a two-layer MLP W_1 sigma(W_2 z) with sigma = relu squared."""

    def __init__(self, dim: int, levels: Sequence[Level]) -> None:
        super().__init__()
        if not levels:
            raise ConfigError("levels is empty; a chain needs at least one level (a static one has chunk 0)")
        for level in levels:
            if level.hidden < 1:
                raise ConfigError(f"levels.{level.name}.hidden must be at least 1, got {level.hidden}")
            if level.chunk:
                raise ConfigError(
                    f"levels.{level.name}.chunk is {level.chunk}: this release serves levels of frequency 0 only; set 0"
                )
        self.clock = LevelClock(levels)
        self.up = nn.ParameterList(torch.randn(level.hidden, dim) * dim**-0.5 for level in levels)
        self.down = nn.ParameterList(torch.zeros(dim, level.hidden) for level in levels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z [.., D] -> [.., D]; levels after the first add to what the one before them passes on."""
        y = linear(relu(linear(z, self.up[0])).square(), self.down[0])
        for up, down in zip(self.up[1:], self.down[1:], strict=True):
            y = y + linear(relu(linear(y, up)).square(), down)
        return y
