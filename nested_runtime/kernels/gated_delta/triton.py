"""The gated delta rule on a GPU: decode in one pass over the state, prefill in two kernels, backward for training.

Decode reads a slot's state once and writes it once, to the same slot or to another (a fork). Prefill takes the inverse

    V = (I + A)^-1 diag(eta),   A_ij = eta_i (g_{i-1} / g_j) (k_i.k_j) for j < i,   g_t = prod_{s<=t} alpha_s

of all chunks side by side, by substitution, then walks each sequence's chunks with BV rows of the state in registers:

    D = V (v - g_{i-1} S k)          o_i = g_i S q_i + sum_{j<=i} (g_i / g_j) (k_j.q_i) d_j
    S <- g_C S + sum_j (g_C / g_j) d_j k_j^T

Ratios of g are taken in log space and masked before exp. State and sums are float32; operands of products have the
dtype of q, k and v: bfloat16, or float32 with TF32 products (on AMD exact ones). Only the inverse takes three TF32
products, as it is what near-equal keys make sensitive.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from nested_runtime.kernels.gated_delta.triton_backward import backward
from nested_runtime.kernels.triton_math import precision, tile

__all__ = ["gated_delta", "packed_gated_delta"]

CHUNK, ROWS = 32, 32  # tokens of a chunk, rows of the state in one program
TRAIN_CHUNK, TRAIN_ROWS = 16, 16  # the backward holds more tiles at once


@triton.jit
def decode(
    q, k, v, log_alpha, eta, pool, slots, out_slots, cu_seqlens, out, stride,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (B, H, V / BV): sequences of one token."""
    b, h = tl.program_id(0), tl.program_id(1)
    r, c = tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, KP)
    slot, target = tl.load(slots + b).to(tl.int64), tl.load(out_slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if end - begin != 1:
        return
    token = begin.to(tl.int64) * H + h
    if slot == 0:
        tl.store(out + token * V + r, tl.zeros([BV], tl.float32), mask=r < V)
        return
    cells, mask = h * V * K + r[:, None] * K + c[None, :], (r < V)[:, None] & (c < K)[None, :]
    s = tl.load(pool + slot * stride + cells, mask=mask, other=0.0)
    kt = tl.load(k + token * K + c, mask=c < K, other=0.0).to(tl.float32)
    qt = tl.load(q + token * K + c, mask=c < K, other=0.0).to(tl.float32)
    vt = tl.load(v + token * V + r, mask=r < V, other=0.0).to(tl.float32)
    alpha = tl.exp(tl.load(log_alpha + token))
    d = tl.load(eta + token) * (vt - tl.sum(s * kt[None, :], 1))
    o = alpha * tl.sum(s * qt[None, :], 1) + d * tl.sum(kt * qt, 0)
    tl.store(out + token * V + r, o, mask=r < V)
    tl.store(pool + target * stride + cells, alpha * s + d[:, None] * kt[None, :], mask=mask)


@triton.jit
def _place(cu_seqlens, n, sequences, C: tl.constexpr, BP: tl.constexpr):
    """Sequence, first token and tokens of the n-th chunk of the packed batch; 0 tokens past the last."""
    s = tl.arange(0, BP)
    begin = tl.load(cu_seqlens + s, mask=s < sequences, other=0)
    chunks = (tl.load(cu_seqlens + s + 1, mask=s < sequences, other=0) - begin + C - 1) // C
    ends = tl.cumsum(tl.where(s < sequences, chunks, 0), 0)
    owner = tl.sum((ends <= n).to(tl.int32), 0)
    before = tl.sum(tl.where(s < owner, chunks, 0), 0)
    last = tl.minimum(owner, sequences - 1)
    first = tl.load(cu_seqlens + last) + (n - before) * C
    return first, tl.where(owner < sequences, tl.minimum(tl.load(cu_seqlens + last + 1) - first, C), 0)


@triton.jit
def invert(
    k, log_alpha, eta, cu_seqlens, inverses, decays, sequences, columns,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H): inverses [chunks, H, C, C] and log g [chunks, H, C] of every chunk."""
    n, h = tl.program_id(0), tl.program_id(1)
    first, count = _place(cu_seqlens, n, sequences, C, BP)
    if count <= 0:
        return
    i, c = tl.arange(0, C), tl.arange(0, 16)
    token = (first + i).to(tl.int64) * H + h
    kk = tl.zeros([C, C], tl.float32)
    for c0 in range(0, columns, 16):
        inside = (i < count)[:, None] & (c0 + c < K)[None, :]
        kt = tl.load(k + token[:, None] * K + (c0 + c)[None, :], mask=inside, other=0.0)
        kk = tl.dot(kt, tl.trans(kt), kk, input_precision=PREC)
    la = tl.load(log_alpha + token, mask=i < count, other=0.0)
    et = tl.load(eta + token, mask=i < count, other=0.0)
    g = tl.cumsum(la, 0)
    row, column = i[:, None], i[None, :]
    ratio = tl.exp(tl.where(row < column, (g - la)[None, :] - g[:, None], float("-inf")))
    at = kk * ratio * et[None, :]  # A^T
    inverse = tl.where(row == column, 1.0, 0.0)
    for t in range(1, C):
        a = tl.sum(tl.where(column == t, at, 0.0), 1)
        inverse = tl.where(row == t, inverse - tl.sum(a[:, None] * inverse, 0)[None, :], inverse)
    block = (n * H + h).to(tl.int64) * C
    tl.store(inverses + block * C + row * C + column, inverse)
    tl.store(decays + block + i, g)


@triton.jit
def scan(
    q, k, v, log_alpha, eta, inverses, decays, pool, slots, out_slots, cu_seqlens, out, kept, stride,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    BP: tl.constexpr, MIN: tl.constexpr, KEEP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H, V / BV): sequences of MIN tokens or more; KEEP: states before chunks into kept [chunks, H, V, K]."""
    b, h = tl.program_id(0), tl.program_id(1)
    i, r, c = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, KP)
    slot, target = tl.load(slots + b).to(tl.int64), tl.load(out_slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if end - begin < MIN:
        return
    s = tl.arange(0, BP)
    lengths = tl.load(cu_seqlens + s + 1, mask=s < b, other=0) - tl.load(cu_seqlens + s, mask=s < b, other=0)
    block = tl.sum((lengths + C - 1) // C, 0).to(tl.int64)
    cells, mask = h * V * K + r[:, None] * K + c[None, :], (r < V)[:, None] & (c < K)[None, :]
    state = tl.load(pool + slot * stride + cells, mask=mask & (slot > 0), other=0.0)
    row, column = i[:, None], i[None, :]
    for first in range(begin, end, C):
        inside = (first + i < end) & (slot > 0)
        token = (first + i).to(tl.int64) * H + h
        wide = inside[:, None] & (c < K)[None, :]
        kt = tl.load(k + token[:, None] * K + c[None, :], mask=wide, other=0.0)
        qt = tl.load(q + token[:, None] * K + c[None, :], mask=wide, other=0.0)
        vt = tl.load(v + token[:, None] * V + r[None, :], mask=inside[:, None] & (r < V)[None, :], other=0.0)
        la = tl.load(log_alpha + token, mask=inside, other=0.0)
        et = tl.load(eta + token, mask=inside, other=0.0)
        g = tl.load(decays + (block * H + h) * C + i)
        last = tl.sum(la, 0)
        if KEEP:
            tl.store(kept + block * (H * V * K) + cells, state, mask=mask)
        s0 = tl.trans(state.to(kt.dtype))
        seen = tl.dot(kt, s0, input_precision=PREC) * tl.exp(g - la)[:, None]
        inverse = tl.load(inverses + ((block * H + h) * C + row) * C + column)
        rhs = et[:, None] * (vt.to(tl.float32) - seen)
        d = tl.dot(inverse.to(kt.dtype), rhs.to(kt.dtype), input_precision=PREC)
        ratio = tl.exp(tl.where(row >= column, g[:, None] - g[None, :], float("-inf")))
        weights = tl.dot(qt, tl.trans(kt), input_precision=PREC) * ratio
        o = tl.dot(qt, s0, input_precision=PREC) * tl.exp(g)[:, None]
        o = tl.dot(weights.to(kt.dtype), d.to(kt.dtype), o, input_precision=PREC)
        tl.store(out + token[:, None] * V + r[None, :], o, mask=(first + i < end)[:, None] & (r < V)[None, :])
        folded = d * tl.exp(tl.where(inside, last - g, float("-inf")))[:, None]
        state = tl.dot(tl.trans(folded.to(kt.dtype)), kt, tl.exp(last) * state, input_precision=PREC)
        block += 1
    tl.store(pool + target * stride + cells, state, mask=mask & (slot > 0))


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_alpha: torch.Tensor, eta: torch.Tensor, pool: torch.Tensor,
    slots: torch.Tensor, out_slots: torch.Tensor, cu_seqlens: torch.Tensor, out: torch.Tensor, least: int, keep: bool,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Prefill; inverses, log g and the kept states of all chunks."""
    total, heads, dim = k.shape
    rows, sequences, chunks = v.shape[2], len(slots), total // chunk + len(slots)
    inverses = torch.empty(chunks, heads, chunk, chunk, device=k.device)
    decays = torch.empty(chunks, heads, chunk, device=k.device)
    kept = torch.empty(chunks if keep else 0, heads, rows, dim, device=k.device)
    sizes = {"H": heads, "K": dim, "C": chunk, "BP": triton.next_power_of_2(sequences)}
    invert[chunks, heads](
        k, log_alpha, eta, cu_seqlens, inverses, decays, sequences, dim, **sizes, PREC=precision(), num_stages=1
    )
    scan[sequences, heads, triton.cdiv(rows, ROWS)](
        q, k, v, log_alpha, eta, inverses, decays, pool, slots, out_slots, cu_seqlens, out, kept, pool.stride(0),
        **sizes, KP=tile(dim), V=rows, BV=ROWS, MIN=least, KEEP=keep, PREC="tf32", num_warps=4, num_stages=1,
    )  # fmt: skip
    return inverses, decays, kept


def packed_gated_delta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_alpha: torch.Tensor, eta: torch.Tensor, pool: torch.Tensor,
    slots: torch.Tensor, cu_seqlens: torch.Tensor, *, out_slots: torch.Tensor | None = None, longest: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Read a packed batch; `pool` is updated in place at `slots`, or written at `out_slots` (then `slots` keep theirs).

    q, k [T, H, K], v [T, H, V] float32 or bfloat16; log_alpha, eta [T, H] float32; pool [S+1, H, V, K] float32, any
    stride between slots; slots, out_slots [B] int32, 0 = padding in both; longest: see `Batch`. Returns o [T, H, V]
    float32; those of padding are zero.
    """
    q, k, v, log_alpha, eta = (t.contiguous() for t in (q, k, v, log_alpha, eta))
    total, heads, dim = k.shape
    rows, sequences = v.shape[2], len(slots)
    target = slots if out_slots is None else out_slots
    out = torch.empty(total, heads, rows, device=k.device)
    decode[sequences, heads, triton.cdiv(rows, ROWS)](
        q, k, v, log_alpha, eta, pool, slots, target, cu_seqlens, out, pool.stride(0),
        H=heads, K=dim, V=rows, KP=tile(dim), BV=ROWS, num_warps=4,
    )  # fmt: skip
    if longest != 1:
        _launch(q, k, v, log_alpha, eta, pool, slots, target, cu_seqlens, out, 2, False)
    return out


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, log_alpha, eta, state = (t.contiguous() for t in args)
        batch, length, heads, _ = k.shape
        rows, device = v.shape[3], k.device
        flat = [t.flatten(0, 1) for t in (q, k, v, log_alpha, eta)]
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        slots = torch.arange(1, batch + 1, dtype=torch.int32, device=device)
        pool = torch.cat([torch.zeros_like(state[:1]), state])
        out = torch.empty(batch * length, heads, rows, device=device)
        fq, fk, fv, fa, fe = flat
        inverses, decays, kept = _launch(fq, fk, fv, fa, fe, pool, slots, slots, bounds, out, 1, True, TRAIN_CHUNK)
        ctx.save_for_backward(*flat, inverses, decays, kept, bounds)
        return out.view(batch, length, heads, rows), pool[1:].clone()

    @staticmethod
    @once_differentiable  # a second derivative must fail, not be wrong
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, log_alpha, eta, inverses, decays, kept, bounds = ctx.saved_tensors
        d_out, d_state = (g.contiguous().float() for g in grads)
        found = backward(
            q, k, v, log_alpha, eta, inverses, decays, kept, bounds, d_out.flatten(0, 1), d_state, TRAIN_ROWS
        )
        shape = d_out.shape[:2]
        return *(
            g.unflatten(0, shape).to(t.dtype) for g, t in zip(found[:5], (q, k, v, log_alpha, eta), strict=True)
        ), found[5]


def gated_delta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_alpha: torch.Tensor, eta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.gated_delta`: same arguments and result, differentiable once in every tensor; float32 state."""
    out, new = _Scan.apply(q, k, v, log_alpha, eta, state)
    return out, new
