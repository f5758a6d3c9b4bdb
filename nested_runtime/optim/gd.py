"""Gradient descent: W <- W - lr g. The stateless rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nested_runtime.optim.base import InnerRule, RuleState, per_session

__all__ = ["GradientDescent"]


@dataclass(frozen=True)
class GradientDescent(InnerRule):
    """W <- W - lr g."""

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        return (param - per_session(lr, param) * grad).to(param.dtype), {}
