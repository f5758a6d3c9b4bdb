"""Titans' long-term memory with a matrix memory (2501.00663 Eq. 9-14): momentum, decay, and projections that are fixed.

    S_t = mu_t S_{t-1} - theta_t grad 1/2 ||M_{t-1} k_t - v_t||^2        M_t = alpha_t M_{t-1} + S_t       o_t = M_t q_t

The gradient is taken at M_{t-1} for every token (the paper's chunks take it at the chunk's start, an approximation that
a linear memory does not need). theta, alpha and mu depend on the token; theta < 1 keeps the recurrence stable:
for one unit key it is heavy-ball descent, which needs theta < 2 (1 + mu).
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from nested_runtime.memory.linear import Gates, LinearMemory
from nested_runtime.memory.streams import ALPHA_BIAS

__all__ = ["Titans"]

THETA_BIAS = (0.0, 0.0)
MU_BIAS = (-2.0, 0.5)  # momentum of 0.12 to 0.62 over the heads


class Titans(LinearMemory):
    """The control with momentum and decay, without self-modification."""

    has_momentum = True

    def __init__(self, dim: int, heads: int, head_dim: int, conv_width: int = 4) -> None:
        super().__init__(dim, heads, head_dim, (THETA_BIAS, ALPHA_BIAS, MU_BIAS), conv_width)

    def gates(self, logits: torch.Tensor) -> Gates:
        """See `LinearMemory.gates`."""
        theta, alpha, mu = logits.unbind(-2)
        theta = theta.sigmoid()
        return Gates(theta, theta, logsigmoid(alpha), logsigmoid(mu))
