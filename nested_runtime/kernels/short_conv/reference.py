"""Causal depthwise convolution of width W with a carried window, then SiLU: the torch path, differentiable.

y_t,c = silu(sum_i w_i,c x_{t-W+1+i},c)         window = the W-1 inputs before the first token (zeros when fresh)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

__all__ = ["short_conv"]


class _Compiled(Protocol):
    def forward(self, padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def backward(
        self, padded: torch.Tensor, weight: torch.Tensor, d_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def _compiled(x: torch.Tensor) -> _Compiled | None:
    """Compiled loops for this tensor, None where there are none: torch's one pass per tap serves then."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    return cast("_Compiled", import_module("nested_runtime.kernels.short_conv.train_numba"))


class _Conv(torch.autograd.Function):
    """The linear part with a backward that accumulates in place instead of building padded slices."""

    @staticmethod
    def forward(ctx: Any, *args: torch.Tensor) -> torch.Tensor:
        padded, weight = args
        ctx.save_for_backward(padded, weight)
        if fast := _compiled(padded):
            return fast.forward(padded.detach(), weight.detach())
        width, length = weight.shape[0], padded.shape[1] - weight.shape[0] + 1
        out = padded[:, :length] * weight[0]
        for i in range(1, width):
            out.addcmul_(padded[:, i : i + length], weight[i])
        return out

    @staticmethod
    @once_differentiable  # a second derivative must fail, not be wrong
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (d_out,) = grads
        padded, weight = ctx.saved_tensors
        if fast := _compiled(padded):
            return fast.backward(padded.detach(), weight.detach(), d_out)
        width, length = weight.shape[0], d_out.shape[1]
        d_padded = torch.zeros_like(padded)
        d_weight = torch.empty_like(weight)
        for i in range(width):
            d_padded[:, i : i + length].addcmul_(d_out, weight[i])
            d_weight[i] = (d_out * padded[:, i : i + length]).sum((0, 1))
        return d_padded, d_weight


def short_conv(x: torch.Tensor, window: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, F], window [B, W-1, F], weight [W, F] -> y [B, T, F], the next window [B, W-1, F]."""
    padded = torch.cat([window.to(x.dtype), x], dim=1)
    out: torch.Tensor = _Conv.apply(padded, weight.to(x.dtype))  # type: ignore[no-untyped-call]
    return silu(out), padded[:, x.shape[1] :].to(window.dtype)
