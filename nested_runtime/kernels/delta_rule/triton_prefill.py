"""Runs of tokens, chunk by chunk: a program is a head of a sequence and walks its chunks with the state in L1 and L2.

The keys, values and gates of a chunk come out of the state that the chunk before it left, so neither chunks nor row
blocks can be given to other programs, and the triangular inverse cannot be taken for all chunks beforehand as in
`gated_delta/triton.py`. A token lies at its place i in the chunk, i < C; places before the first token are the tail:

    k, v, eta, alpha         from M x^k and M x^v, k and v by way of `scratch`
    V = (I + A)^-1           A_ij = eta_i (g_{i-1} / g_j) (k_i.k_j), rows of the tail zero; by substitution
    D = V rhs                rhs = eta (rate (M u [+ v]) - g_{i-1} X k), the tail's own d in its rows
    o_i = g_i X q_i + B q_i + sum_{j<=i} (g_i / g_j) (k_j.q_i) D_j

A full chunk is folded into the anchor, an unfinished one is left in the tail; block of BR rows after block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_runtime.kernels.triton_math import log_sigmoid, sigmoid

__all__ = ["prefill"]


@triton.jit
def _project(x, anchor, start, out, first, K: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr,
             PREC: tl.constexpr):  # fmt: skip
    """out [CP, K] = x M^T over the K rows from `first` on; returns the squared norms [CP]."""
    i, r, c = tl.arange(0, CP), tl.arange(0, BR), tl.arange(0, KP)
    square = tl.zeros([CP], tl.float32)
    for r0 in range(0, K, BR):
        rm = r0 + r < K
        cells, mask = (first + r0 + r)[:, None] * K + c[None, :], rm[:, None] & (c < K)[None, :]
        m = tl.load(anchor + cells, mask=mask, other=0.0) + tl.load(start + cells, mask=mask, other=0.0)
        y = tl.dot(x, tl.trans(m), input_precision=PREC)
        square += tl.sum(y * y, 1)
        tl.store(out + i[:, None] * K + (r0 + r)[None, :], y, mask=rm[None, :] & (i >= 0)[:, None])
    return square


@triton.jit
def _gate(x, anchor, start, row, K: tl.constexpr, KP: tl.constexpr):
    c = tl.arange(0, KP)
    m = tl.load(anchor + row * K + c, mask=c < K, other=0.0) + tl.load(start + row * K + c, mask=c < K, other=0.0)
    return tl.sum(x * m[None, :], 1)


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
    anchor, start, rates, tail_d, out, scratch_v, k, q, u, inverse, weights, eta, g, g_prev, norm_v, g_last, done, stop,
    first, count, which, column, mem,
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, R: tl.constexpr,
    H: tl.constexpr, GATES: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Rows first..first+count of the state; `mem`: they are rows column.. of the main memory, which is read."""
    i, r, c = tl.arange(0, CP), tl.arange(0, BR), tl.arange(0, KP)
    rm, at = r < count, first + r
    new, old = (i >= done) & (i < stop), i < done
    cells, mask = at[:, None] * K + c[None, :], rm[:, None] & (c < K)[None, :]
    tail = i[:, None] * R + at[None, :]
    x = tl.load(anchor + cells, mask=mask, other=0.0)
    b = tl.load(start + cells, mask=mask, other=0.0)
    rate = tl.load(rates + which + (r if GATES else r * 0), mask=rm & (which < 4), other=1.0)
    m = x + b
    decaying = m if WHOLE else x
    error = tl.dot(u, tl.trans(m), input_precision=PREC)
    seen = tl.dot(k, tl.trans(decaying), input_precision=PREC) * tl.exp(g_prev)[:, None]
    if mem:
        v = tl.load(scratch_v + i[:, None] * K + (column + r)[None, :], mask=new[:, None] & rm[None, :], other=0.0)
        error += v * norm_v[:, None]
    rhs = eta[:, None] * (error * rate[None, :] - seen)
    rhs = tl.where(new[:, None], rhs, 0.0) + tl.load(tail_d + tail, mask=old[:, None] & rm[None, :], other=0.0)
    d = tl.dot(inverse, rhs, input_precision=PREC)
    if mem:
        if TOKEN:
            o = tl.dot(q, tl.trans(decaying), input_precision=PREC) * tl.exp(g)[:, None]
            if not WHOLE:
                o += tl.dot(q, tl.trans(b), input_precision=PREC)
            o += tl.dot(weights, d, input_precision=PREC)
        else:
            o = tl.dot(q, tl.trans(m), input_precision=PREC)
        tl.store(out + i[:, None] * (H * K) + (column + r)[None, :], o, mask=new[:, None] & rm[None, :])
    if stop == C:
        fold = tl.exp(tl.where(i < C, g_last - g, float("-inf")))
        x = tl.exp(g_last) * x + tl.dot(tl.trans(d * fold[:, None]), k, input_precision=PREC)
        if WHOLE:
            x += (tl.exp(g_last) - 1.0) * b
        tl.store(anchor + cells, x, mask=mask)
        tl.store(tail_d + tail, d * 0.0, mask=old[:, None] & rm[None, :])
    else:
        tl.store(tail_d + tail, d, mask=new[:, None] & rm[None, :])


@triton.jit
def prefill(
    mixed, logits, base, rates, anchor, tail_k, tail_d, tail_g, slots, positions, cu_seqlens, out, scratch,
    stride_anchor, stride_k, stride_d, stride_g,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr,
    TOKEN: tl.constexpr, WHOLE: tl.constexpr, ETA_MAX: tl.constexpr, EPS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H). Reads the sequences of more than one token; scratch [B, H, 2, CP, K]. See `triton.py`."""
    b, h = tl.program_id(0), tl.program_id(1)
    R: tl.constexpr = 3 * K + 2
    BLOCKS: tl.constexpr = (K + BR - 1) // BR
    slot = tl.load(slots + b).to(tl.int64)
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    if end - begin < 2:
        return
    i, c = tl.arange(0, CP), tl.arange(0, KP)
    cm = (c < K)[None, :]
    out += h * K
    if slot == 0:
        for t in range(begin, end, CP):
            rows = (t + i).to(tl.int64)[:, None] * (H * K) + c[None, :]
            tl.store(out + rows, tl.zeros([CP, KP], tl.float32), mask=(t + i < end)[:, None] & cm)
        return
    anchor += slot * stride_anchor + h * R * K
    tail_k += slot * stride_k + h * C * K
    tail_d += slot * stride_d + h * C * R
    tail_g += slot * stride_g + h * C
    base += h * R * K
    rates += h * 4
    mixed += h * K
    logits += h
    scratch += (b * H + h).to(tl.int64) * (2 * CP * K)
    scratch_v = scratch + CP * K
    offset = (tl.load(positions + b) % C).to(tl.int32)
    for chunk in range((offset + end - begin + C - 1) // C):
        done = tl.where(chunk == 0, offset, 0)
        stop = tl.minimum(offset + end - begin - chunk * C, C)
        place = i[:, None] * K + c[None, :]
        new, old = (i >= done) & (i < stop), i < done
        token = (begin - offset + chunk * C + i).to(tl.int64)
        cells, inside = token[:, None] * (3 * H * K) + c[None, :], new[:, None] & cm
        xk = tl.load(mixed + H * K + cells, mask=inside, other=0.0)
        eta = tl.load(logits + token * 2 * H, mask=new, other=0.0) + _gate(xk, anchor, base, K, K, KP)
        logit = tl.load(logits + (token * 2 + 1) * H, mask=new, other=0.0) + _gate(xk, anchor, base, K + 1, K, KP)
        log_alpha = tl.where(new, log_sigmoid(logit), 0.0)
        eta = tl.where(new, ETA_MAX * tl.exp(log_alpha) * sigmoid(eta), 0.0)
        before = tl.load(tail_g + done - 1, mask=done > 0, other=0.0)
        g = tl.where(old, tl.load(tail_g + i, mask=old, other=0.0), before + tl.cumsum(log_alpha, 0))
        g_prev = g - log_alpha
        g_last = before + tl.sum(log_alpha, 0)
        norm_k = 1.0 / tl.sqrt(_project(xk, anchor, base, scratch, 0, K, KP, CP, BR, PREC) + EPS)
        xv = tl.load(mixed + 2 * H * K + cells, mask=inside, other=0.0)
        norm_v = 1.0 / tl.sqrt(_project(xv, anchor, base, scratch_v, K + 2, K, KP, CP, BR, PREC) + EPS)
        q = tl.load(mixed + cells, mask=inside, other=0.0)
        q = q / tl.sqrt(tl.sum(q * q, 1) + EPS)[:, None]
        tl.debug_barrier()  # the scratch is written
        fresh = tl.load(scratch + place, mask=inside, other=0.0) * norm_k[:, None]
        k = fresh + tl.load(tail_k + place, mask=old[:, None] & cm, other=0.0)
        u = tl.load(scratch_v + place, mask=inside, other=0.0) * norm_v[:, None] - fresh
        row, column = i[:, None], i[None, :]
        kk = tl.dot(k, tl.trans(k), input_precision=PREC)
        # transposed: row j, column i of A
        ratio = tl.exp(tl.where((row < column) & new[None, :], g_prev[None, :] - g[:, None], float("-inf")))
        inverse = _inverse(ratio * kk * eta[None, :], done, stop, CP)
        ratio = tl.exp(tl.where((row >= column) & new[:, None], g[:, None] - g[None, :], float("-inf")))
        weights = tl.dot(q, tl.trans(k), input_precision=PREC) * ratio
        read = out + (begin - offset + chunk * C).to(tl.int64) * (H * K)
        _block(anchor, base, rates, tail_d, read, scratch_v, k, q, u, inverse, weights, eta, g, g_prev, norm_v, g_last,
               done, stop, K, 2, 1, 0, False, K, KP, C, CP, 16, R, H, True, TOKEN, WHOLE, PREC)  # fmt: skip
        for n in range(3 * BLOCKS):
            memory, within = n // BLOCKS, n % BLOCKS * BR
            first = memory * K + within + tl.where(memory > 0, 2, 0)
            which = tl.where(memory == 0, 0, 2 + memory)  # rates of k, eta, alpha, v; the main memory has none
            count = tl.minimum(K - within, BR)
            _block(anchor, base, rates, tail_d, read, scratch_v, k, q, u, inverse, weights, eta, g, g_prev, norm_v,
                   g_last, done, stop, first, count, which, within, memory == 2,
                   K, KP, C, CP, BR, R, H, False, TOKEN, WHOLE, PREC)  # fmt: skip
        tl.debug_barrier()  # all have read the old tail
        if stop == C:
            tl.store(tail_k + place, k * 0.0, mask=old[:, None] & cm)
            tl.store(tail_g + i, g * 0.0, mask=old)
        else:
            tl.store(tail_k + place, k, mask=inside)
            tl.store(tail_g + i, g, mask=new)
        tl.debug_barrier()  # the next chunk reads what was written
