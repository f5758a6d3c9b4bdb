"""The short convolution on a GPU over a packed batch, its windows carried in place in the pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nested_runtime.core import Batch
from nested_runtime.kernels.triton_math import sigmoid

__all__ = ["packed_conv"]

TOKENS, FEATURES = 16, 128  # of one program


@triton.jit
def _convolve(
    x, pool, weight, slots, cu_seqlens, out, total, sequences, features, stride,
    W: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / BT, features / BF): y of BT packed tokens, whatever sequences they belong to."""
    t, f = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BF + tl.arange(0, BF)
    tm, fm = t < total, (f < features)[None, :]
    s = tl.arange(0, BP)
    ends = tl.load(cu_seqlens + 1 + s, mask=s < sequences, other=2147483647)
    owner = tl.minimum(tl.sum((ends[None, :] <= t[:, None]).to(tl.int32), 1), sequences - 1)
    begin = tl.load(cu_seqlens + owner)
    slot = tl.load(slots + owner).to(tl.int64)
    y = tl.zeros([BT, BF], tl.float32)
    for i in tl.static_range(W):
        source = t - (W - 1) + i
        own, kept = tm & (slot > 0) & (source >= begin), tm & (slot > 0) & (source < begin)
        value = tl.load(x + source.to(tl.int64)[:, None] * features + f[None, :], mask=own[:, None] & fm, other=0.0)
        window = slot * stride + (source - begin + W - 1).to(tl.int64) * features
        value += tl.load(pool + window[:, None] + f[None, :], mask=kept[:, None] & fm, other=0.0)
        y += value * tl.load(weight + i * features + f, mask=f < features, other=0.0)[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * features + f[None, :], y * sigmoid(y), mask=tm[:, None] & fm)


@triton.jit
def _carry(x, pool, slots, cu_seqlens, features, stride, W: tl.constexpr, WP: tl.constexpr, BF: tl.constexpr):
    """Grid (B, features / BF): the last W-1 inputs of a sequence become its window."""
    b, f = tl.program_id(0), tl.program_id(1) * BF + tl.arange(0, BF)
    slot = tl.load(slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if (slot == 0) | (begin == end):
        return
    i = tl.arange(0, WP)
    source, fm, wm = end - (W - 1) + i, (f < features)[None, :], i < W - 1
    own, kept = wm & (source >= begin), wm & (source < begin)
    value = tl.load(x + source.to(tl.int64)[:, None] * features + f[None, :], mask=own[:, None] & fm, other=0.0)
    window = slot * stride + (source - begin + W - 1).to(tl.int64) * features
    value += tl.load(pool + window[:, None] + f[None, :], mask=kept[:, None] & fm, other=0.0)
    tl.debug_barrier()  # older rows move down: read all before the first is written
    tl.store(pool + slot * stride + i[:, None] * features + f[None, :], value, mask=wm[:, None] & fm)


def packed_conv(x: torch.Tensor, pool: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
    """See `numba.packed_conv`: same arguments, result and effect; float32 only."""
    x, weight = x.contiguous(), weight.detach().contiguous()
    total, features, width = x.shape[0], x.shape[1], weight.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sequences, across = len(batch.slots), triton.cdiv(features, FEATURES)
    _convolve[triton.cdiv(total, TOKENS), across](
        x, pool, weight, batch.slots, batch.cu_seqlens, out, total, sequences, features, pool.stride(0),
        W=width, BP=triton.next_power_of_2(sequences), BT=TOKENS, BF=FEATURES,
    )  # fmt: skip
    if width > 1:
        _carry[sequences, across](
            x, pool, batch.slots, batch.cu_seqlens, features, pool.stride(0),
            W=width, WP=triton.next_power_of_2(width - 1), BF=FEATURES,
        )  # fmt: skip
    return out
