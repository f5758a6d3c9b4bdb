"""Weights that never change while serving, as they are or in int8 with one scale a row (weight-only quantisation).

    W ~ diag(s) Q,  s_i = max_j |W_ij| / 127,  Q = round(diag(s)^-1 W): |W_ij - s_i Q_ij| <= s_i / 2

Activations, deltas, memories and products stay float32, so a session's numbers do not depend on its companions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.kernels.int8_linear.reference import int8_linear

__all__ = ["Int8Weight", "Weight", "embedding", "linear", "quantize"]


class Int8Weight(nn.Module):
    """A matrix [out, in] in int8. Buffers: `q` [out, in] int8, `scale` [out]."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        wide = weight.detach()
        scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(wide.dtype).tiny)
        self.q: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("q", (wide / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.q.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is multiplied with."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.q.device

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows as floats, [.., in]."""
        return self.q[index].to(self.scale.dtype) * self.scale[index][..., None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., in] -> x W^T [.., out]."""
        if not torch.is_grad_enabled() and x.dtype == torch.float32 and x.device.type == "cpu":
            kernels = packed_kernels("cpu", torch.float32)
            if kernels is not None and kernels.name in ("native", "numba"):
                from nested_runtime.kernels.int8_linear import numba  # compiles; not everybody has it

                if x.numel() // x.shape[-1] <= numba.MAX_ROWS:
                    return numba.int8_linear(x, self.q, self.scale)
        return int8_linear(x, self.q, self.scale)


Weight = nn.Parameter | Int8Weight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [.., in] -> x W^T + b [.., out]."""
    if not isinstance(weight, Int8Weight):
        return functional.linear(x, weight, bias)
    out: torch.Tensor = weight(x)
    return out if bias is None else out + bias.to(out.dtype)


def embedding(index: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Rows of W by index [..], [.., in]."""
    return weight.rows(index) if isinstance(weight, Int8Weight) else functional.embedding(index, weight)


def quantize(module: nn.Module, *names: str) -> None:
    """Replace the matrices `names` of a module by int8 ones."""
    for name in names:
        weight = getattr(module, name)
        if isinstance(weight, nn.Parameter):
            delattr(module, name)
            setattr(module, name, Int8Weight(weight))
