"""The convolution as training runs it: forward and backward by hand, in compiled loops where `dispatch` allows them."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from nested_runtime.kernels.dispatch import packed_kernels

__all__ = ["short_conv"]

COMPILED = (torch.float32, torch.float64)


class _Conv(torch.autograd.Function):
    """The linear part with a backward that accumulates in place instead of building padded slices."""

    @staticmethod
    def forward(ctx: Any, *args: torch.Tensor) -> torch.Tensor:
        padded, weight = args
        ctx.save_for_backward(padded, weight)
        if _is_compiled(padded):
            from nested_runtime.kernels.short_conv import train_numba

            return train_numba.forward(padded.detach(), weight.detach())
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
        if _is_compiled(padded):
            from nested_runtime.kernels.short_conv import train_numba

            return train_numba.backward(padded.detach(), weight.detach(), d_out)
        width, length = weight.shape[0], d_out.shape[1]
        d_padded = torch.zeros_like(padded)
        d_weight = torch.empty_like(weight)
        for i in range(width):
            d_padded[:, i : i + length].addcmul_(d_out, weight[i])
            d_weight[i] = (d_out * padded[:, i : i + length]).sum((0, 1))
        return d_padded, d_weight


def _is_compiled(x: torch.Tensor) -> bool:
    """Whether numba's loops serve tensors like `x`; otherwise torch makes one pass per tap."""
    if x.device.type != "cpu" or x.dtype not in COMPILED:
        return False
    kernels = packed_kernels(x.device.type, x.dtype)
    return kernels is not None and kernels.name in ("native", "numba")


def short_conv(x: torch.Tensor, window: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, F], window [B, W-1, F], weight [W, F] -> y [B, T, F], the next window; see `reference.py`."""
    padded = torch.cat([window.to(x.dtype), x], dim=1)
    out: torch.Tensor = _Conv.apply(padded, weight.to(x.dtype))  # type: ignore[no-untyped-call]
    return silu(out), padded[:, x.shape[1] :].to(window.dtype)
