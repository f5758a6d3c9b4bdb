"""What the Triton kernels share: scalar functions, shapes of tiles, and the precision of their matrix products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["log_sigmoid", "precision", "sigmoid", "tile", "warps"]


@triton.jit
def log_sigmoid(x):
    """Log of 1 / (1 + e^-x) to full float32 accuracy: log1p(z) = log(u) z / (u - 1), u = 1 + z (Goldberg)."""
    z = tl.exp(-tl.abs(x))
    u = 1.0 + z
    d = u - 1.0
    log1p = tl.where(d == 0.0, z, tl.log(u) * (z / tl.where(d == 0.0, 1.0, d)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


def tile(size: int, smallest: int = 16) -> int:
    """The power of two that holds `size`; at least 16, the smallest side of a matrix product."""
    return max(smallest, int(triton.next_power_of_2(size)))


def warps(dim: int) -> int:
    """Warps of a program that holds [dim, dim] float32 tiles: 32 (at 128: 64) registers a thread for each."""
    return {16: 1, 32: 2, 64: 4}.get(tile(dim), 8)


def precision() -> str:
    """How float32 products run: three TF32 products on NVIDIA (error about 1e-6), exact on AMD and when interpreted."""
    return "ieee" if torch.version.hip else "tf32x3"
