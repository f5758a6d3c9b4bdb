"""Gated DeltaNet (2412.06464 Eq. 10): HOPE's fast memory with fixed projections and without self-generated targets.

S_t = S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from nested_runtime.memory.linear import Gates, LinearMemory
from nested_runtime.memory.streams import ALPHA_BIAS

__all__ = ["GatedDelta"]

BETA_BIAS = (0.0, 0.0)


class GatedDelta(LinearMemory):
    """The control that is a gated delta rule and nothing more."""

    has_momentum = False

    def __init__(self, dim: int, heads: int, head_dim: int, conv_width: int = 4) -> None:
        super().__init__(dim, heads, head_dim, (BETA_BIAS, ALPHA_BIAS), conv_width)

    def gates(self, logits: torch.Tensor) -> Gates:
        """See `LinearMemory.gates`."""
        beta, alpha = logits.unbind(-2)
        beta = beta.sigmoid()
        return Gates(beta, beta * alpha.sigmoid(), logsigmoid(alpha), None)
