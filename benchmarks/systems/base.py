"""What is compared: a language model that reads 512 tokens, or gives every one of some sessions its next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

__all__ = ["BLOCKS", "DIM", "HEADS", "VOCAB", "Case", "System", "tokens"]

DIM, BLOCKS, HEADS, VOCAB = 256, 4, 4, 8192


class Case(NamedTuple):
    """`sessions` that have read `context` tokens; context 0 = read 512 tokens of a fresh session."""

    name: str
    sessions: int
    context: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one step."""
        return self.sessions if self.context else 512


class System(Protocol):
    """One system. `prepare` answers a step to be timed, or None where the case is not measured."""

    name: str
    num_parameters: int

    def prepare(self, case: Case) -> Callable[[], None] | None:
        """Bring sessions to the case's context; the step reads or decodes `case.num_tokens` tokens."""


def tokens(count: int, length: int) -> torch.Tensor:
    """Random token ids [count, length]."""
    return torch.randint(VOCAB, (count, length))
