"""Backward of the stacked rule's chunks, from the last to the first; the lines of `chunk._backward` as tiled products.

The gradient of the state lies in `ds` and is replaced chunk by chunk. Products whose one side is scaled by token take
the scaled copy from scratch. Names are those of `chunk.py`: d_rhs = V^T dD, dU = eta r d_rhs, dP = -eta g_{i-1} d_rhs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_runtime.kernels.delta_rule.triton_chunk import factors, product

__all__ = ["scan_backward"]


@triton.jit
def _rows(
    x, ds, rates, d_rates, d_out, scratch, extra, eta, before, count, columns, height, places,
    STEP: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, B: tl.constexpr, TOKEN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """d_rhs and dU into extra; the gradients of eta, log g_{i-1} and log w [CP], and dX'.X."""
    i, c = tl.arange(0, CP), tl.arange(0, B)
    every = i >= 0
    wk, errors = scratch + R * K + 4 * CP * K, scratch + R * K + 5 * CP * K
    inverse = errors + 3 * CP * R
    d_eta, d_before, d_w = tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
    overlap = tl.zeros([B], tl.float32)
    for r0 in range(0, height, B):
        at, rm = r0 + c, r0 + c < R
        for c0 in range(0, columns, B):
            cells, mask = at[:, None] * K + (c0 + c)[None, :], rm[:, None] & (c0 + c < K)[None, :]
            overlap += tl.sum(tl.load(ds + cells, mask=mask, other=0.0) * tl.load(x + cells, mask=mask, other=0.0), 1)
        place, mask = i[:, None] * R + at[None, :], rm[None, :] & every[:, None]
        dd = tl.zeros([CP, B], tl.float32)
        dd = product(dd, wk, K, 1, i, every, ds, 1, K, at, rm, columns, B, PREC)
        d_w += tl.sum(dd * tl.load(errors + 2 * CP * R + place, mask=mask, other=0.0), 1)
        if TOKEN and r0 + B > 2 * K + 2:
            main = at - (2 * K + 2)
            mm = rm & (main >= 0)
            dd = product(dd, inverse + CP * CP, 1, CP, i, every, d_out, STEP, 1, main, mm, count, B, PREC)
        tl.store(extra + CP * R + place, dd, mask=mask)
        tl.debug_barrier()
        d_rhs = tl.zeros([CP, B], tl.float32)
        d_rhs = product(d_rhs, inverse, 1, CP, i, every, extra + CP * R, R, 1, at, rm, places, B, PREC)
        tl.debug_barrier()  # dU comes to the same place
        error = tl.load(errors + place, mask=mask, other=0.0)
        seen = tl.load(errors + CP * R + place, mask=mask, other=0.0) * before[:, None]
        rate = tl.load(rates + at, mask=rm, other=0.0)
        d_eta += tl.sum(d_rhs * (error * rate[None, :] - seen), 1)
        dt = d_rhs * eta[:, None]
        d_before -= tl.sum(dt * seen, 1)
        so_far = tl.load(d_rates + at, mask=rm, other=0.0)
        tl.store(d_rates + at, so_far + tl.sum(dt * error, 0), mask=rm)
        tl.store(extra + place, d_rhs, mask=mask)
        tl.store(extra + CP * R + place, dt * rate[None, :], mask=mask)
    return d_eta, d_before, d_w, tl.sum(overlap, 0)


@triton.jit
def _state(
    xk, xv, d_out, ds, d_start, scratch, extra, keep, count, columns, height, places,
    STEP: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, B: tl.constexpr, TOKEN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """ds of the state before the chunk, and what the chunk adds to d_start."""
    c = tl.arange(0, B)
    q, u = scratch + R * K + 2 * CP * K, scratch + R * K + 3 * CP * K
    squares = extra + 2 * CP * R
    q_scaled, k_scaled, dy = squares + 2 * CP * CP, squares + 2 * CP * CP + CP * K, squares + 2 * CP * CP + 5 * CP * K
    for r0 in range(0, height, B):
        for c0 in range(0, columns, B):
            row, rm, at, cm = r0 + c, r0 + c < R, c0 + c, c0 + c < K
            cells, mask = row[:, None] * K + at[None, :], rm[:, None] & cm[None, :]
            dx = keep * tl.load(ds + cells, mask=mask, other=0.0)
            dx = product(dx, extra, 1, R, row, rm, k_scaled, K, 1, at, cm, places, B, PREC)
            dm = tl.zeros([B, B], tl.float32)
            dm = product(dm, extra + CP * R, 1, R, row, rm, u, K, 1, at, cm, places, B, PREC)
            if r0 < K + 2:
                dm = product(dm, dy, 1, 2 * K + 2, row, row < K + 2, xk, STEP, 1, at, cm, count, B, PREC)
            if (r0 + B > K + 2) & (r0 < 2 * K + 2):
                vm = (row >= K + 2) & (row < 2 * K + 2)
                dm = product(dm, dy, 1, 2 * K + 2, row, vm, xv, STEP, 1, at, cm, count, B, PREC)
            read = tl.zeros([B, B], tl.float32)
            if r0 + B > 2 * K + 2:
                main = row - (2 * K + 2)
                mm = rm & (main >= 0)
                read = product(read, d_out, 1, STEP, main, mm, q, K, 1, at, cm, count, B, PREC)
                if TOKEN:
                    dx = product(dx, d_out, 1, STEP, main, mm, q_scaled, K, 1, at, cm, count, B, PREC)
            if TOKEN:
                dx += dm
            else:
                dx += dm + read
            tl.store(d_start + cells, tl.load(d_start + cells, mask=mask, other=0.0) + dm + read, mask=mask)
            tl.store(ds + cells, dx, mask=mask)


@triton.jit
def scan_backward(
    xq, xk, xv, eta_logit, alpha_logit, start, rates, kept, d_out, ds, d_start, d_rates, dxq, dxk, dxv, d_eta_logit,
    d_alpha_logit, scratch, tokens, columns, height, places,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, B: tl.constexpr,
    FACTORS: tl.constexpr, SIZE: tl.constexpr, TOKEN: tl.constexpr, ETA_MAX: tl.constexpr, EPS: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H). ds [B, H, R, K]: gradient of the last state, replaced by that of the first; d_start [B, H, R, K] and
    d_rates [B, H, R] start at zero. scratch [B, H, SIZE], its first FACTORS numbers as `factors` leaves them.
    """
    b, h = tl.program_id(0), tl.program_id(1)
    STEP: tl.constexpr = H * K
    program = (b * H + h).to(tl.int64)
    chunks = (tokens + C - 1) // C
    scratch += program * SIZE
    start += h * R * K
    rates += h * R
    ds += program * R * K
    d_start += program * R * K
    d_rates += program * R
    k, q, v = scratch + R * K, scratch + R * K + 2 * CP * K, scratch + R * K + CP * K
    d, weights = scratch + R * K + 5 * CP * K + 2 * CP * R, scratch + R * K + 5 * CP * K + 3 * CP * R + CP * CP
    extra = scratch + FACTORS
    d_qk, symmetric = extra + 2 * CP * R, extra + 2 * CP * R + CP * CP
    q_scaled = symmetric + CP * CP
    k_scaled, dq, dk, dv, dy = (
        q_scaled + CP * K, q_scaled + 2 * CP * K, q_scaled + 3 * CP * K, q_scaled + 4 * CP * K, q_scaled + 5 * CP * K
    )  # fmt: skip
    main = (2 * K + 2) * K
    i, c = tl.arange(0, CP), tl.arange(0, B)
    every, row, column = i >= 0, i[:, None], i[None, :]
    square, vectors = row * CP + column, weights + CP * CP + i
    for n in tl.range(0, chunks, disable_licm=True):  # addresses of every product at once do not fit into registers
        m = chunks - 1 - n
        count = tl.minimum(tokens - m * C, C)
        inside = i < count
        token = (b.to(tl.int64) * tokens + m * C) * H + h
        x = kept + ((b.to(tl.int64) * (chunks + 1) + m) * H + h) * (R * K)
        do = d_out + token * K
        log_alpha, eta, g = factors(
            xq + token * K, xk + token * K, xv + token * K, eta_logit + token, alpha_logit + token, start, rates, x,
            scratch, count, columns, height, STEP, H, K, R, CP, B, ETA_MAX, EPS, PREC,
        )  # fmt: skip
        decay, before, keep = tl.exp(g), tl.exp(g - log_alpha), tl.exp(tl.sum(log_alpha, 0))
        for c0 in range(0, columns, B):
            place, mask = i[:, None] * K + (c0 + c)[None, :], every[:, None] & (c0 + c < K)[None, :]
            tl.store(q_scaled + place, tl.load(q + place, mask=mask, other=0.0) * decay[:, None], mask=mask)
            tl.store(k_scaled + place, tl.load(k + place, mask=mask, other=0.0) * (-eta * before)[:, None], mask=mask)
        d_eta, d_before, d_w, overlap = _rows(
            x, ds, rates, d_rates, do, scratch, extra, eta, before, count, columns, height, places,
            STEP, K, R, CP, B, TOKEN, PREC,
        )  # fmt: skip
        dg = tl.where(i == CP - 1, tl.sum(d_w, 0) + keep * overlap, 0.0) - d_w
        tl.debug_barrier()
        zero = tl.zeros([CP, CP], tl.float32)
        if TOKEN:
            dw = product(zero, do, STEP, 1, i, inside, d + 2 * K + 2, 1, R, i, every, columns, B, PREC)
            dlog = dw * tl.load(weights + square)
            dg += tl.sum(dlog, 1) - tl.sum(dlog, 0)
            dw *= tl.exp(tl.where(row >= column, g[:, None] - g[None, :], float("-inf")))
            tl.store(d_qk + square, dw)
        kk = product(zero, k, K, 1, i, every, k, 1, K, i, every, columns, B, PREC)
        f = tl.exp(tl.where((row > column) & inside[:, None], (g - log_alpha)[:, None] - g[None, :], float("-inf")))
        dlf = product(zero, extra, R, 1, i, every, d, 1, R, i, every, height, B, PREC) * -f
        d_eta += tl.sum(dlf * kk, 1)
        dkk = dlf * eta[:, None]
        dlog = dkk * kk
        d_before += tl.sum(dlog, 1)
        dg -= tl.sum(dlog, 0)
        tl.store(symmetric + square, dkk + tl.trans(dkk))
        tl.debug_barrier()
        along_q, along_k, along_v = tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
        for c0 in range(0, columns, B):
            at, cm = c0 + c, c0 + c < K
            place, mask = i[:, None] * K + at[None, :], every[:, None] & cm[None, :]
            empty = tl.zeros([CP, B], tl.float32)
            qt = tl.load(q + place, mask=mask, other=0.0)
            if TOKEN:
                t = product(empty, do, STEP, 1, i, inside, x + main, K, 1, at, cm, columns, B, PREC) * decay[:, None]
                dg += tl.sum(t * qt, 1)
                t = product(t, do, STEP, 1, i, inside, start + main, K, 1, at, cm, columns, B, PREC)
                t = product(t, d_qk, CP, 1, i, every, k, K, 1, at, cm, places, B, PREC)
            else:
                t = product(empty, do, STEP, 1, i, inside, scratch + main, K, 1, at, cm, columns, B, PREC)
            tl.store(dq + place, t, mask=mask)
            along_q += tl.sum(t * qt, 1)
        for c0 in range(0, columns, B):  # apart: addresses of too many products are kept in registers
            at, cm = c0 + c, c0 + c < K
            place, mask = i[:, None] * K + at[None, :], every[:, None] & cm[None, :]
            empty = tl.zeros([CP, B], tl.float32)
            du = product(empty, extra + CP * R, R, 1, i, every, scratch, K, 1, at, cm, height, B, PREC)
            w = tl.exp(tl.where(inside, tl.sum(log_alpha, 0) - g, float("-inf")))
            t = product(empty, d, R, 1, i, every, ds, K, 1, at, cm, height, B, PREC) * w[:, None] - du
            seen = product(empty, extra, R, 1, i, every, x, K, 1, at, cm, height, B, PREC)
            t -= seen * (eta * before)[:, None]
            t = product(t, symmetric, CP, 1, i, every, k, K, 1, at, cm, places, B, PREC)
            if TOKEN:
                t = product(t, d_qk, 1, CP, i, every, q, K, 1, at, cm, places, B, PREC)
            tl.store(dk + place, t, mask=mask)
            along_k += tl.sum(t * tl.load(k + place, mask=mask, other=0.0), 1)
            t = du + tl.load(extra + CP * R + i[:, None] * R + (2 * K + 2 + at)[None, :], mask=mask, other=0.0)
            tl.store(dv + place, t, mask=mask)
            along_v += tl.sum(t * tl.load(v + place, mask=mask, other=0.0), 1)
        total = dg + d_before
        d_log_alpha = tl.sum(total, 0) - tl.cumsum(total, 0) + total - d_before  # sums over what comes after
        d_eta *= eta
        da = tl.where(inside, (d_log_alpha + d_eta) * (1.0 - tl.exp(log_alpha)), 0.0)
        de = tl.where(inside, d_eta * (1.0 - tl.load(vectors)), 0.0)
        tl.store(d_alpha_logit + token + i * H, da, mask=inside)
        tl.store(d_eta_logit + token + i * H, de, mask=inside)
        tl.store(dy + i * (2 * K + 2) + K, de)
        tl.store(dy + i * (2 * K + 2) + K + 1, da)
        norm_q, norm_k, norm_v = tl.load(vectors + CP), tl.load(vectors + 2 * CP), tl.load(vectors + 3 * CP)
        tl.debug_barrier()
        for c0 in range(0, columns, B):
            at, cm = c0 + c, (c0 + c < K)[None, :]
            place, mask = i[:, None] * K + at[None, :], every[:, None] & cm
            t = tl.load(dq + place, mask=mask, other=0.0)
            t = (t - tl.load(q + place, mask=mask, other=0.0) * along_q[:, None]) / norm_q[:, None]
            tl.store(dxq + token * K + i[:, None] * STEP + at[None, :], t, mask=cm & inside[:, None])
            t = tl.load(dk + place, mask=mask, other=0.0)
            t = (t - tl.load(k + place, mask=mask, other=0.0) * along_k[:, None]) / norm_k[:, None]
            tl.store(dy + i[:, None] * (2 * K + 2) + at[None, :], t, mask=mask)
            t = tl.load(dv + place, mask=mask, other=0.0)
            t = (t - tl.load(v + place, mask=mask, other=0.0) * along_v[:, None]) / norm_v[:, None]
            tl.store(dy + i[:, None] * (2 * K + 2) + (K + 2 + at)[None, :], t, mask=mask)
        tl.debug_barrier()
        for c0 in range(0, columns, B):
            at, cm = c0 + c, c0 + c < K
            place, mask = token * K + i[:, None] * STEP + at[None, :], inside[:, None] & cm[None, :]
            empty = tl.zeros([CP, B], tl.float32)
            t = product(empty, dy, 2 * K + 2, 1, i, every, scratch, K, 1, at, cm, columns + 2, B, PREC)
            tl.store(dxk + place, t, mask=mask)
            values = (K + 2) * K
            t = product(empty, dy + K + 2, 2 * K + 2, 1, i, every, scratch + values, K, 1, at, cm, columns, B, PREC)
            tl.store(dxv + place, t, mask=mask)
        _state(xk + token * K, xv + token * K, do, ds, d_start, scratch, extra, keep, count, columns, height, places,
               STEP, K, R, CP, B, TOKEN, PREC)  # fmt: skip
        tl.debug_barrier()
