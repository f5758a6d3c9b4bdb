"""Momentum, the memory that compresses the gradients it has seen (NL Eq. 33-34).

m <- a m - lr g,   W <- W + m
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nested_runtime.optim.base import InnerRule, RuleState, check_range, per_session

__all__ = ["Momentum"]


@dataclass(frozen=True)
class Momentum(InnerRule):
    """m <- a m - lr g, W <- W + m. `momentum` is a."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_range(self, momentum=(0.0, 1.0))

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`momentum` m, like the parameter."""
        return {"momentum": shape}

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        m = self.momentum * state["momentum"] - per_session(lr, grad) * grad
        return (param + m).to(param.dtype), {"momentum": m}
