"""Slots rounded to int8 and back on a GPU, many slots in one launch; see `reference.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["pack_int8", "unpack_int8"]

ROWS = 16  # of one program that packs


@triton.jit
def _pack(pool, slots, q, scales, rows, stride, K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    b, r, c = tl.program_id(0), tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, KP)
    slot = tl.load(slots + b).to(tl.int64)
    cells, mask = r[:, None] * K + c[None, :], (r < rows)[:, None] & (c < K)[None, :]
    x = tl.load(pool + slot * stride + cells, mask=mask, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 1) / 127.0
    rounded = tl.floor(x / tl.maximum(scale, 1e-30)[:, None] + 0.5)
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    first = b.to(tl.int64) * rows
    tl.store(q + first * K + cells, rounded.to(tl.int8), mask=mask)
    tl.store(scales + first + r, scale, mask=r < rows)


@triton.jit
def _unpack(q, scales, pool, slots, rows, stride, K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    b, r, c = tl.program_id(0), tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, KP)
    slot = tl.load(slots + b).to(tl.int64)
    if slot == 0:
        return
    cells, mask = r[:, None] * K + c[None, :], (r < rows)[:, None] & (c < K)[None, :]
    first = b.to(tl.int64) * rows
    x = tl.load(q + first * K + cells, mask=mask, other=0).to(tl.float32)
    x *= tl.load(scales + first + r, mask=r < rows, other=0.0)[:, None]
    tl.store(pool + slot * stride + cells, x, mask=mask)


def pack_int8(pool: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.pack_int8`."""
    shape, dim = pool.shape[1:], pool.shape[-1]
    rows = pool[0].numel() // dim
    q = torch.empty(len(slots), *shape, dtype=torch.int8, device=pool.device)
    scales = torch.empty(len(slots), *shape[:-1], device=pool.device)
    grid = (len(slots), triton.cdiv(rows, ROWS))
    _pack[grid](pool, slots, q, scales, rows, pool.stride(0), K=dim, KP=triton.next_power_of_2(dim), BR=ROWS)
    return q, scales


def unpack_int8(q: torch.Tensor, scale: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> None:
    """See `reference.unpack_int8`."""
    dim = pool.shape[-1]
    rows = pool[0].numel() // dim
    grid = (len(slots), triton.cdiv(rows, ROWS))
    _unpack[grid](q, scale, pool, slots, rows, pool.stride(0), K=dim, KP=triton.next_power_of_2(dim), BR=ROWS)
