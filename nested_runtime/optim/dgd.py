"""Delta gradient descent (NL Eq. 56-57): the weights are an associative memory of the surprise at each input.

One token with input x and surprise d = dL/dy: W is the minimiser of 1/2 ||W x + d||^2 + 1/(2 lr) ||W - W_t||_F^2, thus

    W <- W (I - e x x^T) - e d x^T,    e = lr / (1 + lr ||x||^2)

for any ||x|| (Sherman-Morrison; the paper's lr / (1 + lr) is the case ||x|| = 1, and App. C as printed is wrong).
N tokens at once, X [N, fan_in] and G = sum_n d_n x_n^T, minimise the sum of the N errors and the same distance to W_t:

    W <- (W - lr G) (I + lr X^T X)^-1  =  V - lr (V X^T) (I + lr X X^T)^-1 X,    V = W - lr G
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nested_runtime.optim.base import InnerRule, RuleState, per_session
from nested_runtime.optim.matrices import as_matrix

__all__ = ["DeltaGradientDescent"]


@dataclass(frozen=True)
class DeltaGradientDescent(InnerRule):
    """Exact minimiser over all tokens of a step. Parameters without `inputs` (biases, norms) take a GD step."""

    needs_inputs: ClassVar[bool] = True

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        moved = param - per_session(lr, param) * grad
        if inputs is not None:
            dtype = torch.promote_types(moved.dtype, torch.float32)
            moved = _solve(as_matrix(moved).to(dtype), inputs.to(dtype), lr).view_as(moved)
        return moved.to(param.dtype), {}


def _solve(v: torch.Tensor, x: torch.Tensor, lr: float | torch.Tensor) -> torch.Tensor:
    """V (I + lr X^T X)^-1 by a Cholesky factor of the smaller side, N x N or fan_in x fan_in."""
    rate = per_session(lr, v)
    few = x.shape[1] <= x.shape[2]
    gram = x @ x.mT if few else x.mT @ x
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(eye + rate * gram)
    correction = torch.cholesky_solve(x if few else gram, factor)
    return v - rate * ((v @ x.mT) @ correction if few else v @ correction)
