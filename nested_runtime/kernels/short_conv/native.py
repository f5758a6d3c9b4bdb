"""The short convolution on CPU in C++; see `native/conv.h`."""

from __future__ import annotations

from ctypes import c_void_p

import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.native.abi import address, load, packed

__all__ = ["packed_conv"]


def packed_conv(x: torch.Tensor, pool: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
    """See `short_conv/numba.py`."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    pointers = (c_void_p(address(t)) for t in (x, pool, weight))
    load(pool.dtype).conv(packed(batch), *pointers, weight.shape[0], weight.shape[1], c_void_p(address(out)))
    return out
