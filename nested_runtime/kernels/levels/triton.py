"""Deltas of sessions in slots on a GPU: grouped by slot, updated in place; see `reference.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nested_runtime.kernels.triton_math import precision, tile

__all__ = ["low_rank_apply", "outer_step", "step"]

TOKENS, WIDE, BLOCK = 16, 64, 2048


@triton.jit
def _inner(
    x, start, inner, z, slots, cu_seqlens, stride, columns,
    D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B): z = x (V_0 + V_s)^T of the sequence's tokens."""
    b = tl.program_id(0)
    slot = tl.load(slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if slot == 0:
        return
    i, r, c = tl.arange(0, BT), tl.arange(0, RP), tl.arange(0, BD)
    for first in range(begin, end, BT):
        token = (first + i).to(tl.int64)
        acc = tl.zeros([BT, RP], tl.float32)
        for c0 in range(0, columns, BD):
            cm = (c0 + c < D)[None, :]
            cells, mask = r[:, None] * D + (c0 + c)[None, :], (r < R)[:, None] & cm
            v = tl.load(start + cells, mask=mask, other=0.0).to(tl.float32)
            v += tl.load(inner + slot * stride + cells, mask=mask, other=0.0)
            xt = tl.load(x + token[:, None] * D + (c0 + c)[None, :], mask=(first + i < end)[:, None] & cm, other=0.0)
            acc = tl.dot(xt.to(tl.float32), tl.trans(v), acc, input_precision=PREC)
        tl.store(z + token[:, None] * R + r[None, :], acc, mask=(first + i < end)[:, None] & (r < R)[None, :])


@triton.jit
def _outer(
    z, outer, y, slots, cu_seqlens, stride,
    E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, E / BE): y += z U_s^T."""
    b, e = tl.program_id(0), tl.program_id(1) * BE + tl.arange(0, BE)
    slot = tl.load(slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if slot == 0:
        return
    i, r = tl.arange(0, BT), tl.arange(0, RP)
    mask = (e < E)[:, None] & (r < R)[None, :]
    u = tl.load(outer + slot * stride + e[:, None] * R + r[None, :], mask=mask, other=0.0)
    for first in range(begin, end, BT):
        token, inside = (first + i).to(tl.int64), (first + i < end)[:, None]
        zt = tl.load(z + token[:, None] * R + r[None, :], mask=inside & (r < R)[None, :], other=0.0)
        at, within = y + token[:, None] * E + e[None, :], inside & (e < E)[None, :]
        new = tl.load(at, mask=within, other=0.0).to(tl.float32) + tl.dot(zt, tl.trans(u), input_precision=PREC)
        tl.store(at, new, mask=within)


@triton.jit
def _step(
    pool, gradient, momentum, slots, rate, decay, mu, count, stride, stride_m,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, numbers / BLOCK)."""
    b, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + b).to(tl.int64)
    if slot == 0:
        return
    mask = at < count
    move = -tl.load(rate + b) * tl.load(gradient + b.to(tl.int64) * count + at, mask=mask, other=0.0)
    if MOMENTUM:
        move += mu * tl.load(momentum + slot * stride_m + at, mask=mask, other=0.0)
        tl.store(momentum + slot * stride_m + at, move, mask=mask)
    old = tl.load(pool + slot * stride + at, mask=mask, other=0.0)
    if DECAY:
        old *= tl.load(decay + b)
    tl.store(pool + slot * stride + at, old + move, mask=mask)


@triton.jit
def _outer_step(
    pool, errors, inputs, slots, rate, tokens, stride,
    E: tl.constexpr, D: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, E / BE, D / BD): the weights are read and written once, the gradient is never stored."""
    b, e, c = tl.program_id(0), tl.program_id(1) * BE + tl.arange(0, BE), tl.program_id(2) * BD + tl.arange(0, BD)
    slot = tl.load(slots + b).to(tl.int64)
    if slot == 0:
        return
    acc, first = tl.zeros([BE, BD], tl.float32), b.to(tl.int64) * tokens
    for n in range(0, tokens, BT):
        i = n + tl.arange(0, BT)
        em, cm = (i < tokens)[:, None] & (e < E)[None, :], (i < tokens)[:, None] & (c < D)[None, :]
        d = tl.load(errors + (first + i)[:, None] * E + e[None, :], mask=em, other=0.0)
        x = tl.load(inputs + (first + i)[:, None] * D + c[None, :], mask=cm, other=0.0)
        acc = tl.dot(tl.trans(d), x.to(d.dtype), acc, input_precision=PREC)
    at, mask = pool + slot * stride + e[:, None] * D + c[None, :], (e < E)[:, None] & (c < D)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) - tl.load(rate + b) * acc, mask=mask)


def low_rank_apply(
    x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor,
    slots: torch.Tensor, cu_seqlens: torch.Tensor,
) -> None:  # fmt: skip
    """See `reference.low_rank_apply`; x and y contiguous."""
    (rank, dim), wide = start.shape, y.shape[1]
    z = torch.empty(x.shape[0], rank, device=x.device)
    sizes = {"R": rank, "RP": tile(rank), "BT": TOKENS, "PREC": precision()}
    _inner[(len(slots),)](
        x, start.detach(), inner, z, slots, cu_seqlens, inner.stride(0), dim, D=dim, BD=WIDE, num_stages=1, **sizes
    )
    _outer[len(slots), triton.cdiv(wide, WIDE)](
        z, outer, y, slots, cu_seqlens, outer.stride(0), E=wide, BE=WIDE, num_stages=1, **sizes
    )


def step(
    pool: torch.Tensor, gradient: torch.Tensor, slots: torch.Tensor, rate: torch.Tensor,
    momentum: torch.Tensor | None = None, mu: float = 0.0, decay: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """See `reference.step`; float32."""
    count = pool[0].numel()
    state = pool if momentum is None else momentum
    _step[len(slots), triton.cdiv(count, BLOCK)](
        pool, gradient.contiguous(), state, slots, rate, rate if decay is None else decay, mu, count, pool.stride(0),
        state.stride(0), MOMENTUM=momentum is not None, DECAY=decay is not None, BLOCK=BLOCK,
    )  # fmt: skip


def outer_step(
    pool: torch.Tensor, errors: torch.Tensor, inputs: torch.Tensor, slots: torch.Tensor, rate: torch.Tensor
) -> None:
    """See `reference.outer_step`; errors and inputs float32 or bfloat16, weights float32."""
    (wide, dim), tokens = pool.shape[1:], errors.shape[1]
    _outer_step[len(slots), triton.cdiv(wide, WIDE), triton.cdiv(dim, WIDE)](
        pool, errors.contiguous(), inputs.contiguous(), slots, rate, tokens, pool.stride(0),
        E=wide, D=dim, BE=WIDE, BD=WIDE, BT=TOKENS, PREC=precision(), num_stages=2,
    )  # fmt: skip
