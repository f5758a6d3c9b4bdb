"""One token of every sequence: a sweep over the anchor and the tail per head, one row of the tail written.

A program is a head of a sequence. The memories' rows of k and v are read first, as they make the token's k, v, eta and
alpha; then every row r of the state gives, from the same tile (equations in `segment.py`),

    d_r = eta (rate_r (M_r u [+ v_r]) - g_{t-1} X_r k - sum_j (g_{t-1} / g_j) (k_j.k) d_j,r)
    o_r = g_t X_r q + B_r q + sum_{j<=t} (g_t / g_j) (k_j.q) d_j,r          rows of the main memory only

The C-th token of a chunk folds the tail into the anchor. All arithmetic is float32, on no matrix unit but for the fold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_runtime.kernels.triton_math import log_sigmoid, sigmoid

__all__ = ["decode"]


@triton.jit
def _unit(x, eps):
    return x / tl.sqrt(tl.sum(x * x, 0) + eps)


@triton.jit
def _rows(
    anchor, start, rates, tail_d, out, k, q, u, v, kj, a, w, fold, eta, g, g_prev, kq, done, first, count, which,
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, NR: tl.constexpr, R: tl.constexpr,
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
        error += v
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
    if done == C - 1:
        new = tl.exp(g) * x + tl.dot(tl.trans(dj * fold[:, None]), kj, input_precision="ieee") + d[:, None] * k[None, :]
        if WHOLE:
            new += (tl.exp(g) - 1.0) * b
        tl.store(anchor + cells, new, mask=mask)
        tl.store(tail_d + j[:, None] * R + at[None, :], dj * 0.0, mask=(j < done)[:, None] & rm[None, :])
    else:
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
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, TOKEN: tl.constexpr,
    WHOLE: tl.constexpr, ALL: tl.constexpr, ETA_MAX: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (B, H). Reads the sequences of one token, or with ALL every sequence token by token; see `triton.py`."""
    b, h = tl.program_id(0), tl.program_id(1)
    R: tl.constexpr = 3 * K + 2
    slot = tl.load(slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    position = tl.load(positions + b)
    if (not ALL) & (end - begin != 1):
        return
    c, j = tl.arange(0, KP), tl.arange(0, CP)
    cm = c < K
    if slot == 0:
        for t in range(begin, end):
            tl.store(out + (t * H + h).to(tl.int64) * K + c, tl.zeros([KP], tl.float32), mask=cm)
        return
    anchor += slot * stride_anchor + h * R * K
    tail_k += slot * stride_k + h * C * K
    tail_d += slot * stride_d + h * C * R
    tail_g += slot * stride_g + h * C
    base += h * R * K
    rates += h * 4
    for t in range(begin, end):
        done = ((position + (t - begin)) % C).to(tl.int32)
        token = tl.cast(t, tl.int64)
        xq = tl.load(mixed + (token * 3 * H + h) * K + c, mask=cm, other=0.0)
        xk = tl.load(mixed + ((token * 3 + 1) * H + h) * K + c, mask=cm, other=0.0)
        xv = tl.load(mixed + ((token * 3 + 2) * H + h) * K + c, mask=cm, other=0.0)
        e = tl.load(logits + token * 2 * H + h) + _gate(anchor, base, xk, K, K, KP)
        log_alpha = log_sigmoid(tl.load(logits + (token * 2 + 1) * H + h) + _gate(anchor, base, xk, K + 1, K, KP))
        k = _unit(_first_sweep(anchor, base, xk, 0, K, KP), EPS)
        v = _unit(_first_sweep(anchor, base, xv, K + 2, K, KP), EPS)
        q = _unit(xq, EPS)
        u = v - k
        eta = ETA_MAX * tl.exp(log_alpha) * sigmoid(e)
        g_prev = tl.load(tail_g + done - 1, mask=done > 0, other=0.0)
        g = g_prev + log_alpha
        old = j < done
        kj = tl.load(tail_k + j[:, None] * K + c[None, :], mask=old[:, None] & cm[None, :], other=0.0)
        gj = tl.load(tail_g + j, mask=old, other=0.0)
        a = tl.exp(tl.where(old, g_prev - gj, float("-inf"))) * tl.sum(kj * k[None, :], 1)
        w = tl.exp(tl.where(old, g - gj, float("-inf"))) * tl.sum(kj * q[None, :], 1)
        fold = tl.exp(tl.where(old, g - gj, float("-inf")))
        kq = tl.sum(k * q, 0)
        read = out + (token * H + h) * K
        _rows(anchor, base, rates, tail_d, read, k, q, u, v, kj, a, w, fold, eta, g, g_prev, kq, done, 0, K, 0,
              K, KP, C, CP, KP, R, False, False, TOKEN, WHOLE)  # fmt: skip
        _rows(anchor, base, rates, tail_d, read, k, q, u, v, kj, a, w, fold, eta, g, g_prev, kq, done, K, 2, 1,
              K, KP, C, CP, 16, R, True, False, TOKEN, WHOLE)  # fmt: skip
        _rows(anchor, base, rates, tail_d, read, k, q, u, v, kj, a, w, fold, eta, g, g_prev, kq, done, K + 2, K, 3,
              K, KP, C, CP, KP, R, False, False, TOKEN, WHOLE)  # fmt: skip
        _rows(anchor, base, rates, tail_d, read, k, q, u, v, kj, a, w, fold, eta, g, g_prev, kq, done, 2 * K + 2, K, 0,
              K, KP, C, CP, KP, R, False, True, TOKEN, WHOLE)  # fmt: skip
        tl.debug_barrier()  # all have read the old tail
        if done == C - 1:
            tl.store(tail_k + j[:, None] * K + c[None, :], kj * 0.0, mask=old[:, None] & cm[None, :])
            tl.store(tail_g + j, gj * 0.0, mask=old)
        else:
            tl.store(tail_k + done * K + c, k, mask=cm)
            tl.store(tail_g + done, g)
        tl.debug_barrier()  # the next token reads what was written
