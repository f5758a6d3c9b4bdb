"""LanguageModel: what the engine and the trainer need of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from nested_runtime.core import Batch
from nested_runtime.state.spec import TensorSpec

__all__ = ["LanguageModel", "Pool"]

Pool = Mapping[str, torch.Tensor]
"""State tensors by TensorSpec name, each [S+1, *shape], updated in place. Slot 0 is padding."""


class LanguageModel(nn.Module, ABC):
    """A model family: packed serving path and batched training path over the same parameters."""

    vocab_size: int
    chunk: int  # C: inner chunk length in session tokens (1 where there is none)

    @abstractmethod
    def state_spec(self) -> tuple[TensorSpec, ...]:
        """All state tensors of one session, in a stable order."""

    @abstractmethod
    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """Read the packed tokens, update `pool[..][slots]` in place, return hidden states [T, D]."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [N, vocab] of hidden states [N, D], float32."""

    @abstractmethod
    def scan(
        self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor] | None, position: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Training path: tokens [B, T] from `state` (None = fresh) at `position` -> hidden [B, T, D], new state.

        Pure and differentiable; equal to `forward` on the same tokens (the invariant's differentiable twin).
        """
