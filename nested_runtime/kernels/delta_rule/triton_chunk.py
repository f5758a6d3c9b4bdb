"""Training on a GPU: forward and backward of `chunk.chunk_scan`, a program for each head of each sequence.

The forward keeps the state before every chunk and nothing else; the backward (`triton_backward.py`) computes a chunk's
factors again from it. Both are written as products over tiles of B x B with everything between them in `scratch`, which
stays in the L2 cache: whole operands, split for three TF32 products, do not fit into registers (docs/log.md).

retain="zero" is retain="start" with a start of zero, as in `chunk.py`. n <= C tokens fill CP places; the rest are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_runtime.kernels.delta_rule.triton_prefill import _inverse
from nested_runtime.kernels.triton_math import log_sigmoid, sigmoid

__all__ = ["factors", "product", "scan_forward"]


@triton.jit
def product(
    acc, a, a_row, a_depth, rows, rm, b, b_depth, b_column, columns, cm, depth, B: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """acc + A B, where A[i, p] lies at a + i a_row + p a_depth and B[p, j] at b + p b_depth + j b_column."""
    p = tl.arange(0, B)
    for p0 in range(0, depth, B):
        pm = p0 + p < depth
        left = a + rows[:, None] * a_row + (p0 + p)[None, :] * a_depth
        right = b + (p0 + p)[:, None] * b_depth + columns[None, :] * b_column
        x = tl.load(left, mask=rm[:, None] & pm[None, :], other=0.0)
        y = tl.load(right, mask=pm[:, None] & cm[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PREC)
    return acc


@triton.jit
def factors(
    xq, xk, xv, eta_logit, alpha_logit, start, rates, x, scratch, count, columns, height,
    STEP: tl.constexpr, H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, B: tl.constexpr,
    ETA_MAX: tl.constexpr, EPS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Make scratch hold M [R, K]; k, v, q, u = v - k, w k [CP, K]; U, P, D [CP, R]; the inverse and W [CP, CP].

    w_j = g_n / g_j, W_ij = (g_i / g_j) (k_j.q_i); see `chunk.py`. Pointers are those of the chunk's first token.
    Then the gate of eta and the norms of x^q, M x^k and M x^v, [CP] each. Returns log alpha, eta and log g, [CP] each.
    """
    memory, k, v, q = scratch, scratch + R * K, scratch + R * K + CP * K, scratch + R * K + 2 * CP * K
    u, wk, errors = q + CP * K, q + 2 * CP * K, q + 3 * CP * K
    seen, d, inverse = errors + CP * R, errors + 2 * CP * R, errors + 3 * CP * R
    i, c = tl.arange(0, CP), tl.arange(0, B)
    inside, every = i < count, i >= 0
    for r0 in range(0, height, B):
        for c0 in range(0, columns, B):
            cells, mask = (r0 + c)[:, None] * K + (c0 + c)[None, :], (r0 + c < R)[:, None] & (c0 + c < K)[None, :]
            m = tl.load(x + cells, mask=mask, other=0.0) + tl.load(start + cells, mask=mask, other=0.0)
            tl.store(memory + cells, m, mask=mask)
    tl.debug_barrier()  # here and below: what was written is read by other threads
    norm_q, norm_k, norm_v = tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
    eta, alpha = tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
    for c0 in range(0, columns, B):
        at, cm = c0 + c, c0 + c < K
        place, token = i[:, None] * K + at[None, :], i[:, None] * STEP + at[None, :]
        within = inside[:, None] & cm[None, :]
        zero = tl.zeros([CP, B], tl.float32)
        yk = product(zero, xk, STEP, 1, i, inside, memory, 1, K, at, cm, columns, B, PREC)
        yv = product(zero, xv, STEP, 1, i, inside, memory + (K + 2) * K, 1, K, at, cm, columns, B, PREC)
        qt, kt = tl.load(xq + token, mask=within, other=0.0), tl.load(xk + token, mask=within, other=0.0)
        eta += tl.sum(kt * tl.load(memory + K * K + at, mask=cm, other=0.0)[None, :], 1)
        alpha += tl.sum(kt * tl.load(memory + K * K + K + at, mask=cm, other=0.0)[None, :], 1)
        norm_q += tl.sum(qt * qt, 1)
        norm_k += tl.sum(yk * yk, 1)
        norm_v += tl.sum(yv * yv, 1)
        tl.store(wk + place, yk, mask=cm[None, :] & every[:, None])
        tl.store(u + place, yv, mask=cm[None, :] & every[:, None])
    norm_q, norm_k, norm_v = tl.sqrt(norm_q + EPS), tl.sqrt(norm_k + EPS), tl.sqrt(norm_v + EPS)
    log_alpha = tl.load(alpha_logit + i * H, mask=inside, other=0.0) + alpha
    log_alpha = tl.where(inside, log_sigmoid(log_alpha), 0.0)
    gate = sigmoid(tl.load(eta_logit + i * H, mask=inside, other=0.0) + eta)
    eta = tl.where(inside, ETA_MAX * tl.exp(log_alpha) * gate, 0.0)
    vectors = inverse + 2 * CP * CP + i
    tl.store(vectors, gate)
    tl.store(vectors + CP, norm_q)
    tl.store(vectors + 2 * CP, norm_k)
    tl.store(vectors + 3 * CP, norm_v)
    g = tl.cumsum(log_alpha, 0)
    w = tl.exp(tl.where(inside, tl.sum(log_alpha, 0) - g, float("-inf")))
    tl.debug_barrier()
    for c0 in range(0, columns, B):
        at, cm = c0 + c, (c0 + c < K)[None, :]
        place, mask = i[:, None] * K + at[None, :], cm & every[:, None]
        kt = tl.load(wk + place, mask=mask, other=0.0) / norm_k[:, None]
        vt = tl.load(u + place, mask=mask, other=0.0) / norm_v[:, None]
        qt = tl.load(xq + i[:, None] * STEP + at[None, :], mask=cm & inside[:, None], other=0.0) / norm_q[:, None]
        tl.debug_barrier()  # the same places are written
        tl.store(k + place, kt, mask=mask)
        tl.store(v + place, vt, mask=mask)
        tl.store(q + place, qt, mask=mask)
        tl.store(u + place, vt - kt, mask=mask)
        tl.store(wk + place, kt * w[:, None], mask=mask)
    tl.debug_barrier()
    row, column, square = i[:, None], i[None, :], i[:, None] * CP + i[None, :]
    zero = tl.zeros([CP, CP], tl.float32)
    kk = product(zero, k, K, 1, i, every, k, 1, K, i, every, columns, B, PREC)
    # transposed: row j, column i of the system
    ratio = tl.exp(tl.where((row < column) & inside[None, :], (g - log_alpha)[None, :] - g[:, None], float("-inf")))
    tl.store(inverse + square, _inverse(ratio * kk * eta[None, :], 0, count, CP))
    weights = product(zero, q, K, 1, i, every, k, 1, K, i, every, columns, B, PREC)
    weights *= tl.exp(tl.where(row >= column, g[:, None] - g[None, :], float("-inf")))
    tl.store(inverse + CP * CP + square, weights)
    tl.debug_barrier()
    for r0 in range(0, height, B):
        at, rm = r0 + c, r0 + c < R
        main, place = at - (2 * K + 2), i[:, None] * R + at[None, :]
        mask = rm[None, :] & every[:, None]
        error = tl.load(v + i[:, None] * K + main[None, :], mask=mask & (main >= 0)[None, :], other=0.0)
        error = product(error, u, K, 1, i, every, memory, 1, K, at, rm, columns, B, PREC)
        found = tl.zeros([CP, B], tl.float32)
        found = product(found, k, K, 1, i, every, x, 1, K, at, rm, columns, B, PREC)
        rate = tl.load(rates + at, mask=rm, other=0.0)
        rhs = eta[:, None] * (error * rate[None, :] - found * tl.exp(g - log_alpha)[:, None])
        tl.store(errors + place, error, mask=mask)
        tl.store(seen + place, found, mask=mask)
        tl.store(d + place, tl.dot(tl.load(inverse + square), rhs, input_precision=PREC), mask=mask)
    tl.debug_barrier()
    return log_alpha, eta, g


@triton.jit
def scan_forward(
    xq, xk, xv, eta_logit, alpha_logit, start, rates, kept, out, scratch, tokens, columns, height, places,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, B: tl.constexpr,
    SIZE: tl.constexpr, TOKEN: tl.constexpr, ETA_MAX: tl.constexpr, EPS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H). kept [B, chunks + 1, H, R, K] holds the first state and gets those after every chunk.

    scratch [B, H, SIZE]; columns, height, places = K, R, CP: a compiler that knew them would unroll what then spills
    """
    b, h = tl.program_id(0), tl.program_id(1)
    STEP: tl.constexpr = H * K
    chunks = (tokens + C - 1) // C
    first = b.to(tl.int64) * tokens
    x = kept + (b.to(tl.int64) * (chunks + 1) * H + h) * (R * K)
    scratch += (b * H + h).to(tl.int64) * SIZE
    start += h * R * K
    rates += h * R
    q, wk, d = scratch + R * K + 2 * CP * K, scratch + R * K + 4 * CP * K, scratch + R * K + 5 * CP * K + 2 * CP * R
    weights = d + CP * R + CP * CP
    i, c = tl.arange(0, CP), tl.arange(0, B)
    every = i >= 0
    for n in range(chunks):
        count = tl.minimum(tokens - n * C, C)
        token = (first + n * C) * H + h
        log_alpha, _, g = factors(
            xq + token * K, xk + token * K, xv + token * K, eta_logit + token, alpha_logit + token, start, rates, x,
            scratch, count, columns, height, STEP, H, K, R, CP, B, ETA_MAX, EPS, PREC,
        )  # fmt: skip
        for c0 in range(0, columns, B):
            at, cm = c0 + c, c0 + c < K
            o = tl.zeros([CP, B], tl.float32)
            main = (2 * K + 2) * K
            if TOKEN:
                o = product(o, q, K, 1, i, every, x + main, 1, K, at, cm, columns, B, PREC) * tl.exp(g)[:, None]
                o = product(o, q, K, 1, i, every, start + main, 1, K, at, cm, columns, B, PREC)
                o = product(o, weights, CP, 1, i, every, d + 2 * K + 2, R, 1, at, cm, places, B, PREC)
            else:
                o = product(o, q, K, 1, i, every, scratch + main, 1, K, at, cm, columns, B, PREC)
            tl.store(out + token * K + i[:, None] * STEP + at[None, :], o, mask=(i < count)[:, None] & cm[None, :])
        last = tl.exp(tl.sum(log_alpha, 0))
        for r0 in range(0, height, B):
            for c0 in range(0, columns, B):
                row, rm, at, cm = r0 + c, r0 + c < R, c0 + c, c0 + c < K
                cells, mask = row[:, None] * K + at[None, :], rm[:, None] & cm[None, :]
                new = tl.load(x + cells, mask=mask, other=0.0) * last
                new = product(new, d, 1, R, row, rm, wk, K, 1, at, cm, places, B, PREC)
                tl.store(x + H * R * K + cells, new, mask=mask)
        x += H * R * K
        tl.debug_barrier()
