"""Products with int8 weights in torch: differentiable in x, on every device."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

__all__ = ["int8_linear"]


def int8_linear(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y = x (diag(scale) q)^T: x [.., in], q [out, in] int8, scale [out] -> [.., out], in x's dtype."""
    return linear(x, q.to(x.dtype)) * scale.to(x.dtype)
