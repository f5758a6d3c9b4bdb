"""Backward of the gated delta rule's scan: the chunks of a sequence from last to first, BV rows of the state a program.

Each line of the forward (see `triton.py`) is undone, the last first. With P = S k, rhs = eta (v - g_{i-1} P),
D = (I + A)^-1 rhs, W_ij = (g_i / g_j) (k_j.q_i), w_j = g_C / g_j and dX the gradient of X:

    dD = W^T do + w (dS' k)        d_rhs = (I + A)^-T dD        dA = -d_rhs D^T        dW = do D^T
    dS = g_C dS' + (g do)^T q + dP^T k

What is summed over the rows of the state (all but v and S) is written per row block and summed by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nested_runtime.kernels.triton_math import tile

__all__ = ["backward"]


@triton.jit
def _dot(a, b, DT: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(a.to(DT), b.to(DT), input_precision=PREC)


@triton.jit
def _add(c, a, b, DT: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(a.to(DT), b.to(DT), c, input_precision=PREC)


@triton.jit
def _chunk(
    q, k, v, log_alpha, eta, inverses, decays, kept, d_out, dq, dk, dv, d_log_alpha, d_eta, ds, token, first, end,
    block, h, part, r,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, DT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    i, c = tl.arange(0, C), tl.arange(0, KP)
    inside, row, column = first + i < end, i[:, None], i[None, :]
    wide, narrow = token[:, None] * K + c[None, :], token[:, None] * V + r[None, :]
    wm, nm = inside[:, None] & (c < K)[None, :], inside[:, None] & (r < V)[None, :]
    kt = tl.load(k + wide, mask=wm, other=0.0).to(tl.float32)
    la = tl.load(log_alpha + token, mask=inside, other=0.0)
    et = tl.load(eta + token, mask=inside, other=0.0)
    g = tl.load(decays + (block * H + h) * C + i)
    last = tl.sum(la, 0)
    cells = (block * H + h) * V * K + r[:, None] * K + c[None, :]
    s0 = tl.load(kept + cells, mask=(r < V)[:, None] & (c < K)[None, :], other=0.0)
    inverse = tl.load(inverses + ((block * H + h) * C + row) * C + column)
    before = tl.exp(g - la)
    seen = _dot(kt, tl.trans(s0), DT, PREC)
    error = tl.load(v + narrow, mask=nm, other=0.0).to(tl.float32) - before[:, None] * seen
    d = _dot(inverse, et[:, None] * error, DT, PREC)
    do = tl.load(d_out + narrow, mask=nm, other=0.0)
    # S' = g_C S + (w D)^T k
    w = tl.exp(tl.where(inside, last - g, float("-inf")))
    z = _dot(kt, tl.trans(ds), DT, PREC) * w[:, None]
    per_token = tl.sum(d * z, 1)
    dg = tl.where(i == C - 1, tl.sum(per_token, 0) + tl.exp(last) * tl.sum(tl.sum(ds * s0, 1), 0), 0.0) - per_token
    dkt = _dot(d * w[:, None], ds, DT, PREC)
    # o = g S q + W D
    qt = tl.load(q + wide, mask=wm, other=0.0).to(tl.float32)
    ratio = tl.exp(tl.where(row >= column, g[:, None] - g[None, :], float("-inf")))
    weights = _dot(qt, tl.trans(kt), DT, PREC) * ratio
    dd = _add(z, tl.trans(weights), do, DT, PREC)
    scaled = do * tl.exp(g)[:, None]
    dg += tl.sum(scaled * _dot(qt, tl.trans(s0), DT, PREC), 1)
    dw = _dot(do, tl.trans(d), DT, PREC)
    dlog = dw * weights
    dg += tl.sum(dlog, 1) - tl.sum(dlog, 0)
    dqk = dw * ratio
    dqt = _add(_dot(dqk, kt, DT, PREC), scaled, s0, DT, PREC)
    tl.store(dq + part * K + wide, dqt, mask=wm)
    dkt = _add(dkt, tl.trans(dqk), qt, DT, PREC)
    ds = _add(tl.exp(last) * ds, tl.trans(scaled), qt, DT, PREC)
    # D = (I + A)^-1 rhs, A = eta F (k.k)
    d_rhs = _dot(tl.trans(inverse), dd, DT, PREC)
    f = tl.exp(tl.where((row > column) & inside[:, None], (g - la)[:, None] - g[None, :], float("-inf")))
    daf = _dot(d_rhs, tl.trans(d), DT, PREC) * -f
    kk = _dot(kt, tl.trans(kt), DT, PREC)
    de = tl.sum(daf * kk, 1)
    dkk = daf * et[:, None]
    dlog = dkk * kk
    dg_prev = tl.sum(dlog, 1)
    dg -= tl.sum(dlog, 0)
    dkt = _add(dkt, dkk + tl.trans(dkk), kt, DT, PREC)
    # rhs = eta (v - g_prev S k)
    de += tl.sum(d_rhs * error, 1)
    dt = d_rhs * et[:, None]
    tl.store(dv + narrow, dt, mask=nm)
    dp = dt * -before[:, None]
    dg_prev += tl.sum(dp * seen, 1)
    dkt = _add(dkt, dp, s0, DT, PREC)
    tl.store(dk + part * K + wide, dkt, mask=wm)
    ds = _add(ds, tl.trans(dp), kt, DT, PREC)
    total = dg + dg_prev
    dla = tl.sum(total, 0) - tl.cumsum(total, 0) + total - dg_prev  # sums over what comes after
    tl.store(d_log_alpha + part + token, dla, mask=inside)
    tl.store(d_eta + part + token, de, mask=inside)
    return ds


@triton.jit
def scan_backward(
    q, k, v, log_alpha, eta, inverses, decays, kept, cu_seqlens, d_out, d_state, dq, dk, dv, d_log_alpha, d_eta,
    d_start, tokens,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    BP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H, V / BV). dq, dk [V / BV, T, H, K], d_log_alpha, d_eta [V / BV, T, H] hold parts; tokens = T H."""
    b, h = tl.program_id(0), tl.program_id(1)
    i, r, c = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, KP)
    part = tl.program_id(2).to(tl.int64) * tokens
    begin, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
    s = tl.arange(0, BP)
    lengths = tl.load(cu_seqlens + s + 1, mask=s < b, other=0) - tl.load(cu_seqlens + s, mask=s < b, other=0)
    before = tl.sum((lengths + C - 1) // C, 0).to(tl.int64)
    cells = (b * H + h).to(tl.int64) * V * K + r[:, None] * K + c[None, :]
    mask = (r < V)[:, None] & (c < K)[None, :]
    ds = tl.load(d_state + cells, mask=mask, other=0.0)
    chunks = (end - begin + C - 1) // C
    for n in range(chunks):
        m = chunks - 1 - n
        first = begin + m * C
        token = (first + i).to(tl.int64) * H + h
        ds = _chunk(q, k, v, log_alpha, eta, inverses, decays, kept, d_out, dq, dk, dv, d_log_alpha, d_eta, ds, token,
                    first, end, before + m, h, part, r, H, K, V, KP, C, k.dtype.element_ty, PREC)  # fmt: skip
    tl.store(d_start + cells, ds, mask=mask)


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_alpha: torch.Tensor, eta: torch.Tensor,
    inverses: torch.Tensor, decays: torch.Tensor, kept: torch.Tensor, cu_seqlens: torch.Tensor, d_out: torch.Tensor,
    d_state: torch.Tensor, rows: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, log_alpha, eta (packed) and the start state from those of o [T, H, V] and the end state."""
    total, heads, dim = k.shape
    size, blocks, sequences = v.shape[2], triton.cdiv(v.shape[2], rows), len(cu_seqlens) - 1
    dq, dk = (torch.empty(blocks, total, heads, dim, device=k.device) for _ in range(2))
    dv = torch.empty(total, heads, size, device=k.device)
    d_log_alpha, d_eta = (torch.empty(blocks, total, heads, device=k.device) for _ in range(2))
    d_start = torch.empty_like(d_state)
    scan_backward[sequences, heads, blocks](
        q, k, v, log_alpha, eta, inverses, decays, kept, cu_seqlens, d_out, d_state, dq, dk, dv, d_log_alpha, d_eta,
        d_start, total * heads, H=heads, K=dim, V=size, KP=tile(dim), C=inverses.shape[2], BV=rows,
        BP=triton.next_power_of_2(sequences), PREC="tf32", num_warps=4, num_stages=1,
    )  # fmt: skip
    return dq.sum(0), dk.sum(0), dv, d_log_alpha.sum(0), d_eta.sum(0), d_start
