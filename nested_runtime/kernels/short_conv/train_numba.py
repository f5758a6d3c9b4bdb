"""The linear part of the convolution for training on a CPU: one pass forward, one backward, instead of one per tap."""

from __future__ import annotations

from typing import Any

import torch

from nested_runtime.kernels.jit import entry

__all__ = ["backward", "forward"]

Array = Any  # numpy arrays, typed by numba


@entry
def _forward(padded: Array, weight: Array, out: Array) -> None:
    width, channels = weight.shape
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            y = out[b, t]
            for c in range(channels):
                y[c] = padded[b, t, c] * weight[0, c]
            for i in range(1, width):
                x, w = padded[b, t + i], weight[i]
                for c in range(channels):
                    y[c] += x[c] * w[c]


@entry
def _backward(padded: Array, weight: Array, d_out: Array, d_padded: Array, d_weight: Array) -> None:
    width, channels = weight.shape
    for b in range(d_out.shape[0]):
        for t in range(d_out.shape[1]):
            d = d_out[b, t]
            for i in range(width):
                x, w, dx, dw = padded[b, t + i], weight[i], d_padded[b, t + i], d_weight[i]
                for c in range(channels):
                    dx[c] += d[c] * w[c]
                    dw[c] += d[c] * x[c]


def forward(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """padded [B, W-1+T, F], weight [W, F] -> [B, T, F]: sum_i w_i x_{t+i}."""
    out = padded.new_empty(padded.shape[0], padded.shape[1] - weight.shape[0] + 1, padded.shape[2])
    _forward(padded.contiguous().numpy(), weight.contiguous().numpy(), out.numpy())
    return out


def backward(padded: torch.Tensor, weight: torch.Tensor, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `forward` with respect to `padded` and `weight`."""
    d_padded, d_weight = torch.zeros_like(padded), torch.zeros_like(weight)
    x, w, d = (t.contiguous().numpy() for t in (padded, weight, d_out))
    _backward(x, w, d, d_padded.numpy(), d_weight.numpy())
    return d_padded, d_weight
