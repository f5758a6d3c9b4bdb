"""Levels for a converted checkpoint: which MLPs learn, how often, and how their deltas start (NL 7.3)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nested_runtime.errors import ConfigError
from nested_runtime.memory.level import Level

__all__ = ["BLOCKS", "OPTIMIZER", "RANK", "RATE", "Stack", "fresh_starts", "stacked_levels"]

# Measured on a small Llama, docs/log.md 2026-11-26.
RANK, BLOCKS, OPTIMIZER, RATE = 16, "last-quarter", "adam", 0.02
SHARES = {"all": 1.0, "last-half": 0.5, "last-quarter": 0.25}


@dataclass(frozen=True)
class Stack:
    """What the command line says of levels: `chunks` fastest first, `rank` None = dense, see `Level`."""

    chunks: tuple[int, ...]
    rank: int | None = RANK
    blocks: str = BLOCKS
    optimizer: str = OPTIMIZER
    rate: float = RATE

    @classmethod
    def of(cls, chunks: str, rank: str, blocks: str, optimizer: str, rate: float) -> Stack:
        """From the text of the options; ConfigError names the option."""
        if not re.fullmatch(r"[0-9]{1,7}(,[0-9]{1,7})*", chunks):
            raise ConfigError(f"--levels {chunks!r} is not a list of whole numbers, as in 64 or 64,512")
        if rank != "dense" and not re.fullmatch(r"[0-9]{1,6}", rank):
            raise ConfigError(f"--rank {rank!r} is neither a whole number nor dense")
        return cls(tuple(map(int, chunks.split(","))), None if rank == "dense" else int(rank), blocks, optimizer, rate)


def stacked_levels(stack: Stack, blocks: int) -> dict[str, Any]:
    """The config fields of levels; ConfigError names what is impossible."""
    options = {"rank": stack.rank, "optimizer": stack.optimizer, "rate": stack.rate}
    levels = [asdict(Level(chunk, **options)) for chunk in stack.chunks]  # type: ignore[arg-type]  # checked by Level
    return {"levels": levels, "cms": "stacked", "adaptive_blocks": _count(stack.blocks, blocks)}


def _count(name: str, blocks: int) -> int:
    if name in SHARES:
        return max(1, math.ceil(SHARES[name] * blocks))
    number = re.fullmatch(r"last-([0-9]{1,6})", name)
    if not number or not 1 <= int(number[1]) <= blocks:
        raise ConfigError(f"--blocks {name!r} is not one of {', '.join(SHARES)}, last-N with N in 1..{blocks}")
    return int(number[1])


def fresh_starts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Parameters of stacked levels by name: V_0 is random and the same every time, step sizes are as configured."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        if name.endswith("_in")
        else torch.zeros(shape)
        for name, shape in sorted(shapes.items())
    }
