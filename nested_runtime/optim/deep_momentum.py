"""Deep momentum gradient descent, DMGD (NL Eq. 50): the momentum is an MLP fitted online to the gradient stream.

    W <- W - lr s m(u),    W_i <- a W_i - b dL/dW_i,    L = 1/2 mean_r ||m(u_r) - u_r||^2   (P = I)
    m(u) = (1 - a) u + W_1 gelu(W_2 u),    u = g / s, s = root mean square norm of g's rows

The rows u_r of the gradient are keys and values. What recent gradients have in common is learned and passes with a gain
towards 1; what is new passes with 1 - a, as in an exponential average. The paper leaves m, the skip and the scale open:
u makes the inner step b free of the loss's scale, and the skip keeps every direction reachable (W_1 starts at zero).
W_2 starts at fixed orthonormal cosines, so that zeros are the fresh state: the state holds deviations from the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu

from nested_runtime.optim.base import InnerRule, RuleState, check_counts, check_range, per_session
from nested_runtime.optim.matrices import as_matrix

__all__ = ["DeepMomentum"]

NORM_EPS = 1e-30  # added to squared norms


@dataclass(frozen=True)
class DeepMomentum(InnerRule):
    """`momentum` a, `inner_lr` b, `hidden` width of the MLP (state: 2 x hidden x row length)."""

    momentum: float = 0.9
    inner_lr: float = 0.5
    hidden: int = 16

    def __post_init__(self) -> None:
        check_range(self, momentum=(0.0, 1.0), inner_lr=(0.0, 10.0))
        check_counts(self, "hidden")

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`w1` [row, hidden] and `w2` [hidden, row] (deviation from the cosines)."""
        row = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
        return {"w1": (row, self.hidden), "w2": (self.hidden, row)}

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        w1, w2 = state["w1"], state["w2"]
        g = as_matrix(grad).to(w1.dtype)
        scale = (g.square().sum((1, 2), keepdim=True) / g.shape[1] + NORM_EPS).sqrt()
        u = g / scale
        start = _cosines(w2)
        pre = u @ (start + w2).mT
        hidden, slope = gelu(pre), _gelu_slope(pre)
        error = (hidden @ w1.mT - self.momentum * u) / g.shape[1]
        w1_new = self.momentum * w1 - self.inner_lr * error.mT @ hidden
        w2_new = self.momentum * w2 - self.inner_lr * ((error @ w1) * slope).mT @ u
        out = (1 - self.momentum) * u + gelu(u @ (start + w2_new).mT) @ w1_new.mT
        step = per_session(lr, g) * scale * out
        return (param - step.view(param.shape)).to(param.dtype), {"w1": w1_new, "w2": w2_new}


def _cosines(like: torch.Tensor) -> torch.Tensor:
    """[rows, columns] for `like` [S, rows, columns], of unit rows: the cosine basis, its negative, and so on."""
    rows, columns = like.shape[1:]
    r = torch.arange(rows, dtype=like.dtype, device=like.device)[:, None]
    c = torch.arange(columns, dtype=like.dtype, device=like.device)
    basis = torch.cos(math.pi * (c + 0.5) * (r % columns) / columns)
    sign = 1 - 2 * ((r // columns) % 2)
    unit: torch.Tensor = sign * basis / basis.norm(dim=1, keepdim=True)
    return unit


def _gelu_slope(x: torch.Tensor) -> torch.Tensor:
    """d gelu / dx = Phi(x) + x phi(x)."""
    slope: torch.Tensor = 0.5 * (1 + torch.erf(x / 2**0.5)) + x * torch.exp(-0.5 * x * x) / (2 * math.pi) ** 0.5
    return slope
