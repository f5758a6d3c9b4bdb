"""Runs of tokens, chunk by chunk: a program is a head of a sequence and walks its chunks with the state in L1 and L2.

The keys, values and gates of a chunk come out of the state that the chunk before it left, so neither chunks nor row
blocks can be given to other programs, and the triangular inverse cannot be taken for all chunks beforehand as in
`gated_delta/triton.py`. A token lies at its place i in the chunk, i < C; places before the first token are the tail:

    k, v, eta, alpha         from M x^k and M x^v; k, u = v - k and q are kept in `scratch`, as V is
    V = (I + A)^-1           A_ij = eta_i (g_{i-1} / g_j) (k_i.k_j), rows of the tail zero; by substitution
    D = V rhs                rhs = eta (rate (M u [+ v]) - g_{i-1} X k), the tail's own d in its rows
    o_i = g_i X q_i + B q_i + sum_{j<=i} (g_i / g_j) (k_j.q_i) D_j

A full chunk is folded into the anchor, an unfinished one is left in the tail. Products run over tiles of BR rows and BC
columns: operands as wide as the state, split for three TF32 products, do not fit into registers (docs/log.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_runtime.kernels.triton_math import log_sigmoid, sigmoid

__all__ = ["prefill"]


@triton.jit
def _project(
    x, token, new, anchor, start, out, first, columns,
    STEP: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out [CP, K] = x M^T over the K rows from `first` on; returns the squared norms [CP]."""
    i, r, c = tl.arange(0, CP), tl.arange(0, BR), tl.arange(0, BC)
    square = tl.zeros([CP], tl.float32)
    for r0 in range(0, columns, BR):
        rm = r0 + r < K
        y = tl.zeros([CP, BR], tl.float32)
        for c0 in range(0, columns, BC):
            cm = (c0 + c < K)[None, :]
            cells, mask = (first + r0 + r)[:, None] * K + (c0 + c)[None, :], rm[:, None] & cm
            m = tl.load(anchor + cells, mask=mask, other=0.0) + tl.load(start + cells, mask=mask, other=0.0)
            xc = tl.load(x + token[:, None] * STEP + (c0 + c)[None, :], mask=new[:, None] & cm, other=0.0)
            y = tl.dot(xc, tl.trans(m), y, input_precision=PREC)
        square += tl.sum(y * y, 1)
        tl.store(out + i[:, None] * K + (r0 + r)[None, :], y, mask=rm[None, :] & (i >= 0)[:, None])
    return square


@triton.jit
def _gate(
    x, token, new, anchor, start, row, columns,
    STEP: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """x . M_row of every token, [CP]."""
    y, c = tl.zeros([CP], tl.float32), tl.arange(0, BC)
    for c0 in range(0, columns, BC):
        cm, at = c0 + c < K, row * K + c0 + c
        m = tl.load(anchor + at, mask=cm, other=0.0) + tl.load(start + at, mask=cm, other=0.0)
        xc = tl.load(x + token[:, None] * STEP + (c0 + c)[None, :], mask=new[:, None] & cm[None, :], other=0.0)
        y += tl.sum(xc * m[None, :], 1)
    return y


@triton.jit
def _prepare(
    x, token, new, old, scratch, tail_k, norm_k, norm_v, eps, columns,
    STEP: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, BC: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Make scratch hold k (with the tail's), u and q; returns k.k and q.k, [CP, CP] each."""
    i, c = tl.arange(0, CP), tl.arange(0, BC)
    square = tl.zeros([CP], tl.float32)
    for c0 in range(0, columns, BC):
        inside = new[:, None] & (c0 + c < K)[None, :]
        q = tl.load(x + token[:, None] * STEP + (c0 + c)[None, :], mask=inside, other=0.0)
        square += tl.sum(q * q, 1)
    norm_q = 1.0 / tl.sqrt(square + eps)
    kk, qk = tl.zeros([CP, CP], tl.float32), tl.zeros([CP, CP], tl.float32)
    for c0 in range(0, columns, BC):
        cm = (c0 + c < K)[None, :]
        inside, place = new[:, None] & cm, i[:, None] * K + (c0 + c)[None, :]
        q = tl.load(x + token[:, None] * STEP + (c0 + c)[None, :], mask=inside, other=0.0) * norm_q[:, None]
        k = tl.load(scratch + place, mask=inside, other=0.0) * norm_k[:, None]
        u = tl.load(scratch + CP * K + place, mask=inside, other=0.0) * norm_v[:, None] - k
        k += tl.load(tail_k + place, mask=old[:, None] & cm, other=0.0)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PREC)
        qk = tl.dot(q, tl.trans(k), qk, input_precision=PREC)
        tl.debug_barrier()  # the same places are written
        tl.store(scratch + place, k, mask=cm & (i >= 0)[:, None])
        tl.store(scratch + CP * K + place, u, mask=cm & (i >= 0)[:, None])
        tl.store(scratch + 2 * CP * K + place, q, mask=cm & (i >= 0)[:, None])
    return kk, qk


@triton.jit
def _inverse(at, first, last, CP: tl.constexpr):
    """(I + A)^-1 by substitution, `at` = A^T strictly upper triangular with zero rows of A outside first..last."""
    i, j = tl.arange(0, CP)[:, None], tl.arange(0, CP)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0)
    for n in range(tl.maximum(first, 1), last):
        a = tl.sum(tl.where(j == n, at, 0.0), 1)
        row = tl.sum(a[:, None] * inverse, 0)
        inverse = tl.where(i == n, inverse - row[None, :], inverse)
    return inverse


@triton.jit
def _block(
    anchor, start, rates, tail_d, out, scratch, eta, g, g_prev, g_last, done, stop, first, columns,
    K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
    H: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Rows first..first+BR of the state, whichever memories they belong to; the main memory's are read."""
    i, at, c = tl.arange(0, CP), first + tl.arange(0, BR), tl.arange(0, BC)
    rm, column = at < R, at - (2 * K + 2)
    new, old = (i >= done) & (i < stop), i < done
    tail, values = i[:, None] * R + at[None, :], i[:, None] * K + column[None, :]
    read = new[:, None] & (rm & (column >= 0))[None, :]
    # every unit v of these rows of the main memory: u + k
    error = tl.load(scratch + values, mask=read, other=0.0) + tl.load(scratch + CP * K + values, mask=read, other=0.0)
    seen = tl.zeros([CP, BR], tl.float32)
    for c0 in range(0, columns, BC):
        cm, place = (c0 + c < K)[None, :], i[:, None] * K + (c0 + c)[None, :]
        cells, mask = at[:, None] * K + (c0 + c)[None, :], rm[:, None] & cm
        x = tl.load(anchor + cells, mask=mask, other=0.0)
        m = x + tl.load(start + cells, mask=mask, other=0.0)
        u = tl.load(scratch + CP * K + place, mask=cm, other=0.0)
        error = tl.dot(u, tl.trans(m), error, input_precision=PREC)
        k = tl.load(scratch + place, mask=cm, other=0.0)
        seen = tl.dot(k, tl.trans(m if WHOLE else x), seen, input_precision=PREC)
    which = tl.where(at < K, 0, tl.where(at < K + 2, at - K + 1, 3))
    rate = tl.load(rates + which, mask=column < 0, other=1.0)
    rhs = tl.where(new[:, None], eta[:, None] * (error * rate[None, :] - seen * tl.exp(g_prev)[:, None]), 0.0)
    rhs += tl.load(tail_d + tail, mask=old[:, None] & rm[None, :], other=0.0)
    square = i[:, None] * CP + tl.arange(0, CP)[None, :]
    d = tl.dot(tl.load(scratch + 3 * CP * K + square), rhs, input_precision=PREC)
    if first + BR > 2 * K + 2:
        o = tl.zeros([CP, BR], tl.float32)
        if TOKEN:
            weights = tl.load(scratch + 3 * CP * K + CP * CP + square)
            o = tl.dot(weights, d, o, input_precision=PREC)
        for c0 in range(0, columns, BC):
            cm, place = (c0 + c < K)[None, :], i[:, None] * K + (c0 + c)[None, :]
            cells, mask = at[:, None] * K + (c0 + c)[None, :], rm[:, None] & cm
            q = tl.load(scratch + 2 * CP * K + place, mask=cm, other=0.0)
            x = tl.load(anchor + cells, mask=mask, other=0.0)
            b = tl.load(start + cells, mask=mask, other=0.0)
            if TOKEN:
                o = tl.dot(q * tl.exp(g)[:, None], tl.trans(x + b if WHOLE else x), o, input_precision=PREC)
                if not WHOLE:
                    o = tl.dot(q, tl.trans(b), o, input_precision=PREC)
            else:
                o = tl.dot(q, tl.trans(x + b), o, input_precision=PREC)
        tl.store(out + i[:, None] * (H * K) + column[None, :], o, mask=read)
    if stop == C:
        folded = tl.trans(d * tl.exp(tl.where(i < C, g_last - g, float("-inf")))[:, None])
        for c0 in range(0, columns, BC):
            cm, place = (c0 + c < K)[None, :], i[:, None] * K + (c0 + c)[None, :]
            cells, mask = at[:, None] * K + (c0 + c)[None, :], rm[:, None] & cm
            x = tl.exp(g_last) * tl.load(anchor + cells, mask=mask, other=0.0)
            if WHOLE:
                x += (tl.exp(g_last) - 1.0) * tl.load(start + cells, mask=mask, other=0.0)
            x = tl.dot(folded, tl.load(scratch + place, mask=cm, other=0.0), x, input_precision=PREC)
            tl.store(anchor + cells, x, mask=mask)
        tl.store(tail_d + tail, tl.zeros([CP, BR], tl.float32), mask=old[:, None] & rm[None, :])
    else:
        tl.store(tail_d + tail, d, mask=new[:, None] & rm[None, :])


@triton.jit
def _zero(out, begin, end, columns, K: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, BC: tl.constexpr):
    i, c = tl.arange(0, CP), tl.arange(0, BC)
    for t in range(begin, end, CP):
        for c0 in range(0, columns, BC):
            rows = (t + i).to(tl.int64)[:, None] * (H * K) + (c0 + c)[None, :]
            tl.store(out + rows, tl.zeros([CP, BC], tl.float32), mask=(t + i < end)[:, None] & (c0 + c < K)[None, :])


@triton.jit
def prefill(
    mixed, logits, base, rates, anchor, tail_k, tail_d, tail_g, slots, positions, cu_seqlens, out, scratch,
    stride_anchor, stride_k, stride_d, stride_g, columns,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    TOKEN: tl.constexpr, WHOLE: tl.constexpr, ETA_MAX: tl.constexpr, EPS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H). Reads the sequences of more than one token; see `triton.py`.

    scratch [B, H, 3 CP K + 2 CP CP]; columns = K, not known to the compiler, which else unrolls what then spills
    """
    b, h = tl.program_id(0), tl.program_id(1)
    R: tl.constexpr = 3 * K + 2
    STEP: tl.constexpr = 3 * H * K
    slot = tl.load(slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if end - begin < 2:
        return
    out += h * K
    if slot == 0:
        _zero(out, begin, end, columns, K, H, CP, BC)
        return
    i = tl.arange(0, CP)
    anchor += slot * stride_anchor + h * R * K
    tail_k += slot * stride_k + h * C * K
    tail_d += slot * stride_d + h * C * R
    tail_g += slot * stride_g + h * C
    base += h * R * K
    rates += h * 4
    mixed += h * K
    logits += h
    scratch += (b * H + h).to(tl.int64) * (3 * CP * K + 2 * CP * CP)
    offset = (tl.load(positions + b) % C).to(tl.int32)
    for chunk in range((offset + end - begin + C - 1) // C):
        done = tl.where(chunk == 0, offset, 0)
        stop = tl.minimum(offset + end - begin - chunk * C, C)
        new, old = (i >= done) & (i < stop), i < done
        token = (begin - offset + chunk * C + i).to(tl.int64)
        xk, xv = mixed + H * K, mixed + 2 * H * K
        logit = tl.load(logits + token * 2 * H, mask=new, other=0.0)
        eta = logit + _gate(xk, token, new, anchor, base, K, columns, STEP, K, BC, CP)
        logit = tl.load(logits + (token * 2 + 1) * H, mask=new, other=0.0)
        logit += _gate(xk, token, new, anchor, base, K + 1, columns, STEP, K, BC, CP)
        log_alpha = tl.where(new, log_sigmoid(logit), 0.0)
        eta = tl.where(new, ETA_MAX * tl.exp(log_alpha) * sigmoid(eta), 0.0)
        before = tl.load(tail_g + done - 1, mask=done > 0, other=0.0)
        g = tl.where(old, tl.load(tail_g + i, mask=old, other=0.0), before + tl.cumsum(log_alpha, 0))
        g_prev = g - log_alpha
        g_last = before + tl.sum(log_alpha, 0)
        square_k = _project(xk, token, new, anchor, base, scratch, 0, columns, STEP, K, CP, BR, BC, PREC)
        square_v = _project(xv, token, new, anchor, base, scratch + CP * K, K + 2, columns, STEP, K, CP, BR, BC, PREC)
        norm_k, norm_v = 1.0 / tl.sqrt(square_k + EPS), 1.0 / tl.sqrt(square_v + EPS)
        tl.debug_barrier()  # the scratch is written
        kk, qk = _prepare(mixed, token, new, old, scratch, tail_k, norm_k, norm_v, EPS, columns, STEP, K, CP, BC, PREC)
        tl.debug_barrier()
        row, column = i[:, None], i[None, :]
        # transposed: row j, column i of A
        ratio = tl.exp(tl.where((row < column) & new[None, :], g_prev[None, :] - g[:, None], float("-inf")))
        inverse, square = _inverse(ratio * kk * eta[None, :], done, stop, CP), row * CP + column
        weights = qk * tl.exp(tl.where((row >= column) & new[:, None], g[:, None] - g[None, :], float("-inf")))
        tl.store(scratch + 3 * CP * K + square, inverse)
        tl.store(scratch + 3 * CP * K + CP * CP + square, weights)
        tl.debug_barrier()
        read = out + (begin - offset + chunk * C).to(tl.int64) * (H * K)
        for first in range(0, R, BR):
            _block(anchor, base, rates, tail_d, read, scratch, eta, g, g_prev, g_last, done, stop, first,
                   columns, K, C, CP, BR, BC, R, H, TOKEN, WHOLE, PREC)  # fmt: skip
        tl.store(tail_g + i, tl.where(stop == C, 0.0, g), mask=tl.where(stop == C, old, new))
        for c0 in range(0, columns, BC):
            c = c0 + tl.arange(0, BC)
            place, cm = i[:, None] * K + c[None, :], (c < K)[None, :]
            kept = tl.load(scratch + place, mask=(new & (stop < C))[:, None] & cm, other=0.0)
            tl.store(tail_k + place, kept, mask=tl.where(stop == C, old, new)[:, None] & cm)
        tl.debug_barrier()  # the next chunk reads what was written
