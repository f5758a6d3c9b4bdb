"""Muon (NL Eq. 42-44): momentum read through Newton-Schulz, the memory with an orthogonal output.

m <- a m + (1 - a) g,    W <- W - lr sqrt(max(1, rows/columns)) NS_5(a m + (1 - a) g)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nested_runtime.optim.adam import Adam
from nested_runtime.optim.base import InnerRule, RuleState, check_counts, check_range, per_session
from nested_runtime.optim.matrices import as_matrix, is_matrix, newton_schulz, shape_scale

__all__ = ["Muon"]


@dataclass(frozen=True)
class Muon(InnerRule):
    """`momentum` a, `nesterov` looks one gradient ahead (as above), `steps` of Newton-Schulz.

    Vectors and scalars take Adam at `vector_rate` times the learning rate.
    """

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    vector_rate: float = 0.15
    vectors: Adam = field(default=Adam(0.9, 0.98), init=False, repr=False)

    def __post_init__(self) -> None:
        check_range(self, momentum=(0.0, 1.0), vector_rate=(0.0, 1e6))
        check_counts(self, "steps")

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`momentum` m of a matrix; a vector's Adam state."""
        return {"momentum": shape} if is_matrix(shape) else self.vectors.state_shapes(shape)

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        if not is_matrix(param.shape[1:]):
            return self.vectors.step(param, grad, state, lr * self.vector_rate)
        a, grad = self.momentum, grad.to(state["momentum"].dtype)
        m = a * state["momentum"] + (1 - a) * grad
        read = as_matrix(a * m + (1 - a) * grad if self.nesterov else m)
        step = per_session(lr, read) * shape_scale(read) * newton_schulz(read, self.steps)
        return (param - step.view(param.shape)).to(param.dtype), {"momentum": m}
