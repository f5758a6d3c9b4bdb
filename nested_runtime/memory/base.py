"""UpdateRule: what a fast memory is to a model. A new rule is one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from nested_runtime.core import Batch
from nested_runtime.state.spec import TensorSpec

__all__ = ["State", "UpdateRule"]

State = Mapping[str, torch.Tensor]
"""State tensors by the rule's own spec names, [B, *shape]."""


class UpdateRule(nn.Module, ABC):
    """A sequence layer whose per-session state learns while it reads.

    A rule gives `state()` and a pure, differentiable `scan()`; `apply()` (gather, scan, scatter on the slot pool) then
    is right at once on every device. A hot rule overrides `apply()` with a kernel.
    """

    @abstractmethod
    def state(self) -> tuple[TensorSpec, ...]:
        """State tensors of one session; all zeros is the fresh state."""

    @abstractmethod
    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x [B, T, D] read from `state` at session position `position` (the same for all B) -> out [B, T, D], state."""

    def memory(self, state: State) -> dict[str, torch.Tensor]:
        """What has been learned, by names of `state`, so that norms mean something: no buffers, nothing in factors."""
        return dict(state)

    def apply_packed(self, x: torch.Tensor, pool: State, batch: Batch) -> torch.Tensor:
        """x [T, D] packed over `batch`; `pool` holds this rule's tensors [S+1, *shape], updated in place -> [T, D]."""
        out = torch.empty_like(x)
        bounds = batch.cu_seqlens.tolist()
        for b, (slot, position) in enumerate(zip(batch.slots.tolist(), batch.positions.tolist(), strict=True)):
            begin, end = bounds[b], bounds[b + 1]
            if begin == end:
                continue
            if slot == 0:
                out[begin:end] = 0
                continue
            state = {name: tensor[slot : slot + 1] for name, tensor in pool.items()}
            y, new = self.scan(x[None, begin:end], state, position)
            out[begin:end] = y[0]
            for name, tensor in new.items():
                pool[name][slot] = tensor[0]
        return out
