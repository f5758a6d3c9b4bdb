"""The rule on CPU over a packed batch, on the factored state in place in the pool: prefill and decode are one code.

The n tokens of a sequence that fall in one chunk (decode: n = 1) are read in two sweeps over the anchor X_0 and the
start B, four rows at a time, each row being loaded once for all n tokens. With M = B + X_0 and u_t = v_t - k_t:

    k_t, v_t, eta_t, alpha_t   from M x^k_t and M x^v_t
    r_m (M u_t [+ v_t]) - g_{t-1} X_0 k_t   and the read   g_t X_0 q_t + B q_t

then token by token against the tail factors (forward substitution; equations in `segment.py`):

    d_t = eta_t (second sweep - sum_{j<t} (g_{t-1} / g_j) (k_j.k_t) d_j)
    o_t =        second sweep + sum_{j<=t} (g_t / g_j) (k_j.q_t) d_j        over the main memory's rows

With retain="zero" decay acts on M: then M stands for X_0 there and the read has no B. [+ v_t]: main memory's rows only.

Every number of a token comes from the same instructions in the same order whatever n is, so state and reads do not
depend, to the bit, on how the tokens were split into prefills and decode steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions
from nested_runtime.kernels.jit import entry, inner

__all__ = ["packed_scan"]

Array = Any  # numpy arrays, typed by numba


class _Head(NamedTuple):
    """One head of one session, and what the layer knows about it.

    anchor X_0 [R, K]; tail factors [C, K], [C, R], [C]; start B [R, K]; rates r [5] of k, eta, alpha, v and mem
    token: read at the token, else at the anchor; whole: decay pulls the whole memory to zero, else X alone
    """

    anchor: Array
    tail_k: Array
    tail_d: Array
    tail_g: Array
    start: Array
    rates: Array
    token: bool
    whole: bool


class _Work(NamedTuple):
    """Scratch for up to C tokens: operands w, u [2C, K], results y [2C, R], unit v, q, scalars a, b, eta [C]."""

    w: Array
    u: Array
    y: Array
    v: Array
    q: Array
    a: Array
    b: Array
    eta: Array


@inner
def _sweep(X: Array, B: Array, w: Array, u: Array, begin: int, end: int, n: int, y: Array) -> None:
    """y[i, r] = X_r . w_i + B_r . u_i for rows begin <= r < end and i < n."""
    dim = X.shape[1]
    zero = X.dtype.type(0)
    whole = begin + (end - begin) // 4 * 4
    for r in range(begin, whole, 4):
        x0, x1, x2, x3 = X[r], X[r + 1], X[r + 2], X[r + 3]
        b0, b1, b2, b3 = B[r], B[r + 1], B[r + 2], B[r + 3]
        for i in range(n):
            w_i, u_i, y_i = w[i], u[i], y[i]
            s0, s1, s2, s3 = zero, zero, zero, zero
            for c in range(dim):
                s0 += x0[c] * w_i[c] + b0[c] * u_i[c]
                s1 += x1[c] * w_i[c] + b1[c] * u_i[c]
                s2 += x2[c] * w_i[c] + b2[c] * u_i[c]
                s3 += x3[c] * w_i[c] + b3[c] * u_i[c]
            y_i[r], y_i[r + 1], y_i[r + 2], y_i[r + 3] = s0, s1, s2, s3
    for r in range(whole, end):
        x0, b0 = X[r], B[r]
        for i in range(n):
            w_i, u_i = w[i], u[i]
            s0 = zero
            for c in range(dim):
                s0 += x0[c] * w_i[c] + b0[c] * u_i[c]
            y[i, r] = s0


@inner
def _unit(x: Array, begin: int, out: Array) -> None:
    """out = x[begin:] / |x[begin:]|, over the length of out."""
    square = out.dtype.type(0)
    for c in range(out.shape[0]):
        square += x[begin + c] * x[begin + c]
    scale = out.dtype.type(1 / math.sqrt(square + NORM_EPS))
    for c in range(out.shape[0]):
        out[c] = x[begin + c] * scale


@inner
def _log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


@inner
def _generate(mixed: Array, logits: Array, t: int, n: int, h: int, head: _Head, done: int, work: _Work) -> None:
    """First sweep: k, v, eta and log g of n tokens from the memories at the anchor, and the unit q."""
    dim = work.q.shape[1]
    for i in range(n):
        x_k, x_v, w, u = mixed[t + i, 1, h], mixed[t + i, 2, h], work.w[i], work.u[i]
        for c in range(dim):
            w[c] = x_k[c]
            u[c] = x_v[c]
        _unit(mixed[t + i, 0, h], 0, work.q[i])
    _sweep(head.anchor, head.start, work.w, work.w, 0, dim + 2, n, work.y)
    _sweep(head.anchor, head.start, work.u, work.u, dim + 2, 2 * dim + 2, n, work.y)
    for i in range(n):
        y, at = work.y[i], done + i
        _unit(y, 0, head.tail_k[at])
        _unit(y, dim + 2, work.v[i])
        log_alpha = _log_sigmoid(logits[t + i, 1, h] + y[dim + 1])
        head.tail_g[at] = log_alpha + (head.tail_g[at - 1] if at else 0.0)
        work.eta[i] = ETA_MAX * math.exp(log_alpha + _log_sigmoid(logits[t + i, 0, h] + y[dim]))


@inner
def _write_operands(head: _Head, n: int, done: int, rate: float, work: _Work) -> None:
    """w and u with X_0.w + B.u = r M.u_t - g_{t-1} X_0.k_t."""
    for i in range(n):
        at = done + i
        k, v, w, u = head.tail_k[at], work.v[i], work.w[i], work.u[i]
        g = work.y.dtype.type(math.exp(head.tail_g[at - 1]) if at else 1.0)
        g_start = g if head.whole else g - g
        for c in range(k.shape[0]):
            target = rate * (v[c] - k[c])
            w[c] = target - g * k[c]
            u[c] = target - g_start * k[c]


@inner
def _read_operands(head: _Head, n: int, done: int, work: _Work) -> None:
    """Behind the n operands of d: w and u with X_0.w + B.u = g_t X_0.q_t + B.q_t."""
    for i in range(n):
        q, w, u = work.q[i], work.w[n + i], work.u[n + i]
        g = work.y.dtype.type(math.exp(head.tail_g[done + i]) if head.token else 1.0)
        g_start = g if head.whole else work.y.dtype.type(1)
        for c in range(q.shape[0]):
            w[c] = g * q[c]
            u[c] = g_start * q[c]


@inner
def _second_sweep(head: _Head, n: int, done: int, work: _Work) -> None:
    """Right-hand sides of d (without eta) in y[:n], reads before the tail in y[n:2n, mem]."""
    dim, begin = work.q.shape[1], 0
    _read_operands(head, n, done, work)
    for m in range(5):
        end = begin + (1 if m in (1, 2) else dim)
        _write_operands(head, n, done, head.rates[m], work)
        _sweep(head.anchor, head.start, work.w, work.u, begin, end, 2 * n if m == 4 else n, work.y)
        begin = end


@inner
def _weigh(head: _Head, i: int, at: int, work: _Work) -> None:
    """a_j = -eta_t (g_{t-1} / g_j) (k_j.k_t) and b_j = (g_t / g_j) (k_j.q_t) of the tail rows j < at, and b of t."""
    k, q, eta = head.tail_k[at], work.q[i], work.eta[i]
    zero = k.dtype.type(0)
    for j in range(at + 1):
        k_j = head.tail_k[j]
        kk, kq = zero, zero
        for c in range(k.shape[0]):
            kk += k_j[c] * k[c]
            kq += k_j[c] * q[c]
        work.a[j], work.b[j] = kk, kq
    alpha = math.exp(head.tail_g[at] - (head.tail_g[at - 1] if at else 0.0))
    for j in range(at):
        ratio = math.exp(head.tail_g[at - 1] - head.tail_g[j])
        work.a[j] *= -eta * ratio
        work.b[j] *= alpha * ratio


@inner
def _add_rows(weights: Array, rows: Array, count: int, begin: int, out: Array) -> None:
    """out += sum_{j < count} weights_j rows_j[begin:], over the length of out."""
    whole = count // 4 * 4
    for j in range(0, whole, 4):
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        r0, r1, r2, r3 = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        for c in range(out.shape[0]):
            out[c] += w0 * r0[begin + c] + w1 * r1[begin + c] + w2 * r2[begin + c] + w3 * r3[begin + c]
    for j in range(whole, count):
        w0, r0 = weights[j], rows[j]
        for c in range(out.shape[0]):
            out[c] += w0 * r0[begin + c]


@inner
def _substitute(head: _Head, i: int, n: int, at: int, work: _Work, out: Array) -> None:
    """Token i of n, row `at` of the tail: d from the second sweep and the tail, then the read, which sees d itself."""
    d, v, eta, mem = head.tail_d[at], work.v[i], work.eta[i], 2 * out.shape[0] + 2
    for r in range(d.shape[0]):
        d[r] = eta * work.y[i, r]
    for c in range(out.shape[0]):
        d[mem + c] += eta * head.rates[4] * v[c]
        out[c] = work.y[n + i, mem + c]
    _weigh(head, i, at, work)
    _add_rows(work.a, head.tail_d, at, 0, d)
    if head.token:
        _add_rows(work.b, head.tail_d, at + 1, mem, out)


@inner
def _fold(head: _Head, work: _Work) -> None:
    """Close a full chunk: X_0 <- g_C X_0 + sum_j (g_C / g_j) d_j k_j^T, tail <- 0."""
    count = head.tail_g.shape[0]
    last = head.tail_g[count - 1]
    g = work.y.dtype.type(math.exp(last))
    g_start = g - 1 if head.whole else g - g
    for j in range(count):
        work.a[j] = math.exp(last - head.tail_g[j])
    for r in range(head.anchor.shape[0]):
        x, b = head.anchor[r], head.start[r]
        for j in range(count):
            work.b[j] = work.a[j] * head.tail_d[j, r]
        for c in range(x.shape[0]):
            x[c] = g * x[c] + g_start * b[c]
        _add_rows(work.b, head.tail_k, count, 0, x)
    for j in range(count):
        head.tail_g[j] = 0
        for c in range(head.tail_k.shape[1]):
            head.tail_k[j, c] = 0
        for r in range(head.tail_d.shape[1]):
            head.tail_d[j, r] = 0


@inner
def _sequence(
    mixed: Array, logits: Array, begin: int, end: int, h: int, head: _Head, position: int, work: _Work, out: Array
) -> None:
    """Rows begin..end of one sequence, chunk by chunk of its own token count."""
    chunk, t = head.tail_g.shape[0], begin
    while t < end:
        done = (position + t - begin) % chunk
        n = min(chunk - done, end - t)
        _generate(mixed, logits, t, n, h, head, done, work)
        _second_sweep(head, n, done, work)
        for i in range(n):
            _substitute(head, i, n, done + i, work, out[t + i, h])
        if done + n == chunk:
            _fold(head, work)
        t += n


@entry
def _packed(
    mixed: Array, logits: Array, start: Array, rates: Array, anchor: Array, tail_k: Array, tail_d: Array, tail_g: Array,
    slots: Array, positions: Array, cu_seqlens: Array, token: bool, whole: bool, wide: Array, y: Array, scalars: Array,
    out: Array,
) -> None:  # fmt: skip
    """Heads outside, sequences inside: the start of a head stays in cache while the batch passes by."""
    work = _Work(wide[0], wide[1], y, wide[2], wide[3], scalars[0], scalars[1], scalars[2])
    for h in range(start.shape[0]):
        for b in range(slots.shape[0]):
            slot, begin, end = slots[b], cu_seqlens[b], cu_seqlens[b + 1]
            if slot:
                head = _Head(
                    anchor[slot, h], tail_k[slot, h], tail_d[slot, h], tail_g[slot, h], start[h], rates[h], token, whole
                )
                _sequence(mixed, logits, begin, end, h, head, positions[b], work, out)
            else:
                for t in range(begin, end):
                    for c in range(out.shape[2]):
                        out[t, h, c] = 0


def packed_scan(
    mixed: torch.Tensor,
    logits: torch.Tensor,
    base: torch.Tensor,
    rates: torch.Tensor,
    pool: Mapping[str, torch.Tensor],
    batch: Batch,
    options: RuleOptions,
) -> torch.Tensor:
    """Read the packed tokens: NL Eq. 88 with the decisions of MODEL.md section 6, as `reference.py` has it.

    mixed [T, 3, H, K]: x^q, x^k, x^v; logits [T, 2, H]: eta, alpha; base [H, R, K]; rates [H, 4]: r of the k, eta,
    alpha and v memories; pool: anchor [S+1, H, R, K], tail_k [S+1, H, C, K], tail_d [S+1, H, C, R], tail_g [S+1, H, C],
    updated in place at `batch.slots`. All of the pool's dtype, float32 or float64. Returns reads [T, H, K]; those of
    padding sequences are zero.
    """
    (chunk, rows), dim = pool["tail_d"].shape[2:], mixed.shape[3]
    dtype = pool["anchor"].numpy().dtype
    out = torch.empty(mixed.shape[0], *mixed.shape[2:], dtype=mixed.dtype)
    _packed(
        mixed.numpy(), logits.numpy(), base.detach().numpy(), pad(rates.detach(), (0, 1), value=1.0).numpy(),
        pool["anchor"].numpy(), pool["tail_k"].numpy(), pool["tail_d"].numpy(), pool["tail_g"].numpy(),
        batch.slots.numpy(), batch.positions.numpy(), batch.cu_seqlens.numpy(),
        options.read == "token", options.retain == "zero",
        np.empty((4, 2 * chunk, dim), dtype), np.empty((2 * chunk, rows), dtype), np.empty((3, chunk), dtype),
        out.numpy(),
    )  # fmt: skip
    return out
