"""One token of every sequence: a sweep over the anchor and the tail per head, one row of the tail written.

A program is a head of a sequence. The memories' rows of k and v are read first, as they make the token's k, v, eta and
alpha; then every row r of the state gives, from the same tile (equations in `segment.py`),

    d_r = eta (rate_r (M_r u [+ v_r]) - g_{t-1} X_r k - sum_j (g_{t-1} / g_j) (k_j.k) d_j,r)
    o_r = g_t X_r q + B_r q + sum_{j<=t} (g_t / g_j) (k_j.q) d_j,r          rows of the main memory only

in float32, on no matrix unit. The C-th token of a chunk fills the tail; `fold`, a kernel of its own so that this one
needs few registers, then closes the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_runtime.kernels.triton_math import log_sigmoid, sigmoid

__all__ = ["decode", "fold"]


@triton.jit
def _unit(x, eps):
    return x / tl.sqrt(tl.sum(x * x, 0) + eps)


@triton.jit
def _rows(
    anchor, start, rates, tail_d, out, k, q, u, a, w, eta, g, g_prev, kq, done, first, count, which,
    K: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr, NR: tl.constexpr, R: tl.constexpr,
    GATES: tl.constexpr, MEM: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows first..first+count of the state. GATES: they are two memories of one row each, rates from `which` on."""
    r, c, j = tl.arange(0, NR), tl.arange(0, KP), tl.arange(0, CP)
    rm, at = r < count, first + r
    cells, mask = at[:, None] * K + c[None, :], rm[:, None] & (c < K)[None, :]
    x = tl.load(anchor + cells, mask=mask, other=0.0)
    b = tl.load(start + cells, mask=mask, other=0.0)
    rate = 1.0 if MEM else tl.load(rates + which + (r if GATES else r * 0), mask=rm, other=0.0)
    dj = tl.load(tail_d + j[:, None] * R + at[None, :], mask=(j < done)[:, None] & rm[None, :], other=0.0)
    m = x + b
    decaying = m if WHOLE else x
    error = tl.sum(m * u[None, :], 1)
    if MEM:
        error += tl.load(out + r, mask=rm, other=0.0)
        tl.debug_barrier()  # v is read, the same place is written
    seen = tl.exp(g_prev) * tl.sum(decaying * k[None, :], 1) + tl.sum(a[:, None] * dj, 0)
    d = eta * (rate * error - seen)
    if MEM:
        if TOKEN:
            o = tl.exp(g) * tl.sum(decaying * q[None, :], 1) + tl.sum(w[:, None] * dj, 0) + kq * d
            if not WHOLE:
                o += tl.sum(b * q[None, :], 1)
        else:
            o = tl.sum(m * q[None, :], 1)
        tl.store(out + r, o, mask=rm)
    tl.store(tail_d + done * R + at, d, mask=rm)


@triton.jit
def _first_sweep(anchor, start, x, first, K: tl.constexpr, KP: tl.constexpr):
    r, c = tl.arange(0, KP), tl.arange(0, KP)
    cells, mask = (first + r)[:, None] * K + c[None, :], (r < K)[:, None] & (c < K)[None, :]
    m = tl.load(anchor + cells, mask=mask, other=0.0) + tl.load(start + cells, mask=mask, other=0.0)
    return tl.sum(m * x[None, :], 1)


@triton.jit
def _gate(anchor, start, x, row, K: tl.constexpr, KP: tl.constexpr):
    c = tl.arange(0, KP)
    cells = row * K + c
    m = tl.load(anchor + cells, mask=c < K, other=0.0) + tl.load(start + cells, mask=c < K, other=0.0)
    return tl.sum(m * x, 0)


@triton.jit
def decode(
    mixed, logits, base, rates, anchor, tail_k, tail_d, tail_g, slots, positions, cu_seqlens, out,
    stride_anchor, stride_k, stride_d, stride_g,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr,
    TOKEN: tl.constexpr, WHOLE: tl.constexpr, ETA_MAX: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (B, H). Reads the sequences of one token; see `triton.py`."""
    b, h = tl.program_id(0), tl.program_id(1)
    R: tl.constexpr = 3 * K + 2
    slot = tl.load(slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if end - begin != 1:
        return
    c, j = tl.arange(0, KP), tl.arange(0, CP)
    cm, token = c < K, begin.to(tl.int64)
    out += (token * H + h) * K
    if slot == 0:
        tl.store(out + c, tl.zeros([KP], tl.float32), mask=cm)
        return
    anchor += slot * stride_anchor + h * R * K
    tail_k += slot * stride_k + h * C * K
    tail_d += slot * stride_d + h * C * R
    tail_g += slot * stride_g + h * C
    base += h * R * K
    rates += h * 4
    mixed += (token * 3 * H + h) * K
    done = (tl.load(positions + b) % C).to(tl.int32)
    xk = tl.load(mixed + H * K + c, mask=cm, other=0.0)
    xv = tl.load(mixed + 2 * H * K + c, mask=cm, other=0.0)
    e = tl.load(logits + token * 2 * H + h) + _gate(anchor, base, xk, K, K, KP)
    log_alpha = log_sigmoid(tl.load(logits + (token * 2 + 1) * H + h) + _gate(anchor, base, xk, K + 1, K, KP))
    k = _unit(_first_sweep(anchor, base, xk, 0, K, KP), EPS)
    v = _unit(_first_sweep(anchor, base, xv, K + 2, K, KP), EPS)
    q = _unit(tl.load(mixed + c, mask=cm, other=0.0), EPS)
    u = v - k
    eta = ETA_MAX * tl.exp(log_alpha) * sigmoid(e)
    g_prev = tl.load(tail_g + done - 1, mask=done > 0, other=0.0)
    g = g_prev + log_alpha
    old = j < done
    kj = tl.load(tail_k + j[:, None] * K + c[None, :], mask=old[:, None] & cm[None, :], other=0.0)
    gj = tl.load(tail_g + j, mask=old, other=0.0)
    a = tl.exp(tl.where(old, g_prev - gj, float("-inf"))) * tl.sum(kj * k[None, :], 1)
    w = tl.exp(tl.where(old, g - gj, float("-inf"))) * tl.sum(kj * q[None, :], 1)
    kq = tl.sum(k * q, 0)
    tl.store(tail_k + done * K + c, k, mask=cm)
    tl.store(tail_g + done, g)
    tl.store(out + tl.arange(0, KP), v, mask=tl.arange(0, KP) < K)  # until o takes its place
    tl.debug_barrier()
    _rows(anchor, base, rates, tail_d, out, k, q, u, a, w, eta, g, g_prev, kq, done, K, 2, 1,
          K, KP, CP, 16, R, True, False, TOKEN, WHOLE)  # fmt: skip
    for r0 in range(0, K, BR):
        count = tl.minimum(K - r0, BR)
        _rows(anchor, base, rates, tail_d, out, k, q, u, a, w, eta, g, g_prev, kq, done, r0, count, 0,
              K, KP, CP, BR, R, False, False, TOKEN, WHOLE)  # fmt: skip
        _rows(anchor, base, rates, tail_d, out, k, q, u, a, w, eta, g, g_prev, kq, done, K + 2 + r0, count, 3,
              K, KP, CP, BR, R, False, False, TOKEN, WHOLE)  # fmt: skip
        _rows(anchor, base, rates, tail_d, out + r0, k, q, u, a, w, eta, g, g_prev, kq, done, 2 * K + 2 + r0, count, 0,
              K, KP, CP, BR, R, False, True, TOKEN, WHOLE)  # fmt: skip


@triton.jit
def fold(
    base, anchor, tail_k, tail_d, tail_g, slots, positions, cu_seqlens, stride_anchor, stride_k, stride_d, stride_g,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr,
    WHOLE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H). After `decode`: where the token was the C-th, X_0 <- g_C X_0 + sum_j (g_C / g_j) d_j k_j^T."""
    b, h = tl.program_id(0), tl.program_id(1)
    R: tl.constexpr = 3 * K + 2
    slot = tl.load(slots + b).to(tl.int64)
    num = tl.load(cu_seqlens + b + 1) - tl.load(cu_seqlens + b)
    if (slot == 0) | (num != 1) | (tl.load(positions + b) % C != C - 1):
        return
    anchor += slot * stride_anchor + h * R * K
    tail_k += slot * stride_k + h * C * K
    tail_d += slot * stride_d + h * C * R
    tail_g += slot * stride_g + h * C
    r, c, j = tl.arange(0, BR), tl.arange(0, KP), tl.arange(0, CP)
    place, inside = j[:, None] * K + c[None, :], (j < C)[:, None] & (c < K)[None, :]
    g = tl.load(tail_g + j, mask=j < C, other=0.0)
    last = tl.load(tail_g + C - 1)
    k = tl.load(tail_k + place, mask=inside, other=0.0) * tl.exp(last - g)[:, None]
    for first in range(0, R, BR):
        rm = first + r < R
        cells, mask = (first + r)[:, None] * K + c[None, :], rm[:, None] & (c < K)[None, :]
        tail, within = j[:, None] * R + (first + r)[None, :], (j < C)[:, None] & rm[None, :]
        d = tl.load(tail_d + tail, mask=within, other=0.0)
        x = tl.exp(last) * tl.load(anchor + cells, mask=mask, other=0.0)
        if WHOLE:
            x += (tl.exp(last) - 1.0) * tl.load(base + h * R * K + cells, mask=mask, other=0.0)
        tl.store(anchor + cells, x + tl.dot(tl.trans(d), k, input_precision=PREC), mask=mask)
        tl.store(tail_d + tail, tl.zeros([CP, BR], tl.float32), mask=within)
    tl.debug_barrier()  # all have read the tail
    tl.store(tail_k + place, tl.zeros([CP, KP], tl.float32), mask=inside)
    tl.store(tail_g + j, tl.zeros([CP], tl.float32), mask=j < C)
