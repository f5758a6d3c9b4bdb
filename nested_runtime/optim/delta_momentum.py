"""Delta momentum (NL Eq. 48-49): momentum that erases along the new gradient before it writes.

Momentum is a memory with the inner objective 1/2 ||m u^T - P||^2 instead of <m u^T, P>, u = g / ||g||_F:

    m <- m (a I - b u^T u) - lr P g,    W <- W + m,    P = I

What m holds along the present gradient's row space is replaced, what is orthogonal to it is kept. Eq. 49 as printed
drops the inner step b and the normalisation of g; without them a large gradient makes a I - g^T g an expansion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nested_runtime.optim.base import InnerRule, RuleState, check_range, per_session
from nested_runtime.optim.matrices import as_matrix

__all__ = ["DeltaMomentum"]

NORM_EPS = 1e-30  # added to the squared norm of the gradient


@dataclass(frozen=True)
class DeltaMomentum(InnerRule):
    """m <- m (a I - b u^T u) - lr g, W <- W + m. `momentum` is a, `erase` b (0 = plain momentum)."""

    momentum: float = 0.9
    erase: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, momentum=(0.0, 1.0), erase=(0.0, 1.0))

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`momentum` m, like the parameter."""
        return {"momentum": shape}

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        m, g = as_matrix(state["momentum"]), as_matrix(grad).to(state["momentum"].dtype)
        square = g.square().sum((1, 2), keepdim=True) + NORM_EPS
        m = self.momentum * m - self.erase * ((m @ g.mT) @ g) / square - per_session(lr, g) * g
        m = m.view(param.shape)
        return (param + m).to(param.dtype), {"momentum": m}
