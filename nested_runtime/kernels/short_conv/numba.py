"""The short convolution on CPU over a packed batch, its windows carried in place in the pool. SiLU is torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu

from nested_runtime.core import Batch
from nested_runtime.kernels.jit import entry, inner

__all__ = ["packed_conv"]

Array = Any  # numpy arrays, typed by numba


@inner
def _add_product(x: Array, row: int, weight: Array, y: Array) -> None:
    x_t = x[row]
    for c in range(weight.shape[0]):
        y[c] += x_t[c] * weight[c]


@inner
def _convolve(x: Array, window: Array, weight: Array, begin: int, end: int, out: Array) -> None:
    """Rows begin..end of x; the rows before `begin` are those of the window."""
    width = weight.shape[0]
    for t in range(begin, end):
        y = out[t]
        for c in range(y.shape[0]):
            y[c] = 0
        for i in range(width):
            row = t - width + 1 + i
            if row < begin:
                _add_product(window, row - begin + width - 1, weight[i], y)
            else:
                _add_product(x, row, weight[i], y)


@inner
def _carry(x: Array, window: Array, begin: int, end: int) -> None:
    """The last W-1 inputs become the window; ascending order, as a short run moves older rows down."""
    count = window.shape[0]
    for i in range(count):
        row = end - count + i
        for c in range(window.shape[1]):
            window[i, c] = window[row - begin + count, c] if row < begin else x[row, c]


@entry
def _packed(x: Array, pool: Array, weight: Array, slots: Array, cu_seqlens: Array, out: Array) -> None:
    for b in range(slots.shape[0]):
        begin, end, slot = cu_seqlens[b], cu_seqlens[b + 1], slots[b]
        if slot:
            _convolve(x, pool[slot], weight, begin, end, out)
            _carry(x, pool[slot], begin, end)
        else:
            for t in range(begin, end):
                for c in range(out.shape[1]):
                    out[t, c] = 0


def packed_conv(x: torch.Tensor, pool: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Causal depthwise convolution of width W, then SiLU; equal to `reference.short_conv` on every sequence.

        y_t,c = silu(sum_i w_i,c x_{t-W+1+i,c})

    x [T, F] packed over `batch`; pool [S+1, W-1, F]: the windows, updated in place at `batch.slots`; weight [W, F].
    All of one dtype (float32 or float64). Returns y [T, F]; rows of padding sequences are zero.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    _packed(
        x.contiguous().numpy(),
        pool.numpy(),
        weight.detach().numpy(),
        batch.slots.numpy(),
        batch.cu_seqlens.numpy(),
        out.numpy(),
    )
    return silu(out, inplace=True)
