"""LanguageModel: what the engine and the trainer need of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from nested_runtime.core import Batch, KVRows
from nested_runtime.errors import ConfigError
from nested_runtime.memory.level import Level
from nested_runtime.models.adaptation import Stepped
from nested_runtime.state.spec import TensorSpec

__all__ = ["LanguageModel", "Pool"]

Pool = Mapping[str, torch.Tensor]
"""State tensors by TensorSpec name, updated in place: [S+1, *shape], slot 0 is padding; growing ones as blocks."""


class LanguageModel(nn.Module, ABC):
    """A model family: packed serving path and batched training path over the same parameters."""

    TINY: ClassVar[dict[str, Any]]  # a config small enough for the contract tests
    vocab_size: int
    chunk: int  # C: inner chunk length in session tokens (1 where there is none)
    levels: tuple[Level, ...] = ()  # adaptive levels, fastest first
    update_chunk: int = 0  # C_1: session tokens between two updates of the levels; 0 = no level adapts
    pieces: tuple[int, ...] = ()  # where the pieces of a chunk end that `gradients` takes; one = the chunk as a whole
    is_capturable: bool = False  # a decode step may be captured in a CUDA graph: `forward` never waits for the device
    period: int = 0  # `update` of sessions whose positions are equal modulo this may be batched; 0 = only equal ones

    @classmethod
    @abstractmethod
    def from_config(cls, fields: Mapping[str, Any]) -> LanguageModel:
        """Build from a config mapping with fresh parameters; ConfigError names a bad field."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads."""

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

    def memory(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What sessions have learned: tensors [B, ..] by names of the spec, without buffers and counters."""
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}

    def quantize(self) -> None:
        """Serve in int8 what never learns; ConfigError, and nothing changed, where the family cannot."""
        raise ConfigError(f"int8 weights are for hope and hope-attention models, this one is a {type(self).__name__}")

    def update(
        self, slots: torch.Tensor, next_token: torch.Tensor, positions: torch.Tensor, pool: Pool,
        kv: KVRows | None = None, gradients: Mapping[str, torch.Tensor] | None = None,
    ) -> Stepped:  # fmt: skip
        """Let the levels of sessions with a full chunk take their step, before they read `next_token` [B].

        slots [B]; positions [B]: session tokens read, equal modulo `period`; kv: where growing tensors lie. Gradients
        are taken within, unless the sums over all `pieces` are given; call it outside inference mode. Models with
        `update_chunk` 0 have no levels.
        """
        raise NotImplementedError(f"{type(self).__name__} has no levels")

    def gradients(
        self, slots: torch.Tensor, begin: int, end: int, next_token: torch.Tensor, pool: Pool
    ) -> dict[str, torch.Tensor]:
        """Gradients of tokens begin..end of the present chunk of the sessions in `slots`, one of `pieces`; they add up.

        next_token [B]: the token after the piece. Any sessions may be batched. Call it outside inference mode.
        """
        raise NotImplementedError(f"{type(self).__name__} has no levels")
