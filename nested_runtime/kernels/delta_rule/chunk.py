"""The rule chunk by chunk: WY form of the in-chunk recurrence, forward and hand-written backward.

Inside a chunk everything but X is known data (k, v, eta, alpha and the targets are taken at the anchor X_0), so

    X_t = alpha_t X_{t-1} + d_t k_t^T,   d_t = eta_t (T_t - X_{t-1} k_t),   T_t = r (M_a v_t - M_a k_t)
    g_t = prod_{s<=t} alpha_s
    D   = (I + tril(eta_i g_{i-1} / g_j  k_i.k_j, -1))^-1  eta (T - g_{t-1} X_0 k)          MODEL.md section 2
    X_t = g_t X_0 + sum_{j<=t} (g_t / g_j) d_j k_j^T
    o_t = g_t X_0 q_t + B q_t + sum_{j<=t} (g_t / g_j) (k_j.q_t) d_j

Ratios of g are taken in log space and masked before exp. The inverse is by substitution (solve_triangular).
Shapes: N = sequences x heads, n <= C tokens of one chunk, K key dim, R = 3 K + 2 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions, rows
from nested_runtime.kernels.dispatch import function

__all__ = ["ChunkScan", "chunk_scan"]


class _Saved(NamedTuple):
    """What one chunk's backward needs. X: state at the anchor; M: memories at the anchor (X + start)."""

    xq: torch.Tensor
    xk: torch.Tensor
    xv: torch.Tensor
    X: torch.Tensor
    M: torch.Tensor
    q: torch.Tensor
    q_norm: torch.Tensor
    k: torch.Tensor
    k_norm: torch.Tensor
    v: torch.Tensor
    v_norm: torch.Tensor
    u: torch.Tensor
    alpha: torch.Tensor
    eta: torch.Tensor
    eta_gate: torch.Tensor
    G: torch.Tensor
    G_prev: torch.Tensor
    U: torch.Tensor
    P: torch.Tensor
    F: torch.Tensor
    KK: torch.Tensor
    inverse: torch.Tensor
    D: torch.Tensor
    E: torch.Tensor
    QK: torch.Tensor
    Oq: torch.Tensor


def _normalise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(NORM_EPS).sqrt_()
    return x / norm, norm


def _normalise_backward(grad: torch.Tensor, unit: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(grad, unit, (grad * unit).sum(-1, keepdim=True), value=-1).div_(norm)


def _forward(
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    e: torch.Tensor,
    a: torch.Tensor,
    X: torch.Tensor,
    M: torch.Tensor,
    start_mem: torch.Tensor,
    rates: torch.Tensor,
    strict: torch.Tensor,
    inclusive: torch.Tensor,
    options: RuleOptions,
) -> tuple[torch.Tensor, torch.Tensor, _Saved]:
    """One whole chunk: inputs [N, n, .], X, M [N, R, K] -> outputs [N, n, K], next X, what backward needs."""
    dim = xq.shape[-1]
    mem, v_rows = rows(dim)["mem"], rows(dim)["v"]
    y = xk @ M[:, : dim + 2].transpose(1, 2)
    k, k_norm = _normalise(y[..., :dim])
    v, v_norm = _normalise(xv @ M[:, v_rows].transpose(1, 2))
    q, q_norm = _normalise(xq)
    alpha_logit = a + y[..., dim + 1]
    alpha, log_alpha = torch.sigmoid(alpha_logit), logsigmoid(alpha_logit)
    eta_gate = torch.sigmoid(e + y[..., dim])
    eta = ETA_MAX * alpha * eta_gate
    G = log_alpha.cumsum(-1)
    G_prev = G - log_alpha
    u = v - k
    U = u @ M.transpose(1, 2)
    U[..., mem] += v
    P = k @ X.transpose(1, 2)
    KK = k @ k.transpose(1, 2)
    F = (G_prev[:, :, None] - G[:, None, :]).masked_fill_(~strict, -torch.inf).exp_()
    system = (eta[..., None] * F).mul_(KK)
    system.diagonal(dim1=1, dim2=2).fill_(1.0)
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    rhs = torch.addcmul(U * rates, P, G_prev.exp()[..., None], value=-1).mul_(eta[..., None])
    D = inverse @ rhs
    QK = q @ k.transpose(1, 2)
    E = (G[:, :, None] - G[:, None, :]).masked_fill_(~inclusive, -torch.inf).exp_()
    if options.read == "token":
        Oq = q @ X[:, mem].transpose(1, 2)
        out = torch.baddbmm(q @ start_mem.transpose(1, 2), E * QK, D[..., mem]).addcmul_(Oq, G.exp()[..., None])
    else:
        Oq = torch.empty(0)
        out = q @ M[:, mem].transpose(1, 2)
    last = G[:, -1:]
    X_next = torch.baddbmm(X * last.exp()[..., None], (D * (last - G).exp()[..., None]).transpose(1, 2), k)
    saved = _Saved(
        xq, xk, xv, X, M, q, q_norm, k, k_norm, v, v_norm, u, alpha, eta, eta_gate, G, G_prev, U, P, F, KK, inverse, D,
        E, QK, Oq,
    )  # fmt: skip
    return out, X_next, saved


class _Grads(NamedTuple):
    xq: torch.Tensor
    xk: torch.Tensor
    xv: torch.Tensor
    e: torch.Tensor
    a: torch.Tensor
    X: torch.Tensor
    M: torch.Tensor
    start_mem: torch.Tensor | None
    rates: torch.Tensor


def _backward(
    s: _Saved, start_mem: torch.Tensor, rates: torch.Tensor, dout: torch.Tensor, dX_next: torch.Tensor,
    options: RuleOptions,
) -> _Grads:  # fmt: skip
    """Gradients of one chunk. The order follows `_forward` from its last line to its first."""
    dim = s.xq.shape[-1]
    mem, v_rows = rows(dim)["mem"], rows(dim)["v"]
    last = s.G[:, -1:]
    # X_next = g_n X + (w D)^T k
    w = (last - s.G).exp()[..., None]
    dG = torch.zeros_like(s.G)
    g_last = last.exp()
    dX = dX_next * g_last[..., None]
    Z = (s.k @ dX_next.transpose(1, 2)).mul_(w)
    per_token = (s.D * Z).sum(-1)
    dG -= per_token
    dG[:, -1] += per_token.sum(-1) + (dX * s.X).sum((1, 2))
    dD = Z
    dk = (s.D * w) @ dX_next
    dM = torch.zeros_like(s.M)
    d_start = None
    if options.read == "token":
        scaled = dout * s.G.exp()[..., None]
        dG += (scaled * s.Oq).sum(-1)
        dq = torch.baddbmm(scaled @ s.X[:, mem], dout, start_mem)
        dX[:, mem] += scaled.transpose(1, 2) @ s.q
        d_start = dout.transpose(1, 2) @ s.q
        W = s.E * s.QK
        dW = dout @ s.D[..., mem].transpose(1, 2)
        dD[..., mem] += W.transpose(1, 2) @ dout
        dlog = dW * W
        dG += dlog.sum(2) - dlog.sum(1)
        dQK = dW.mul_(s.E)
        dq.baddbmm_(dQK, s.k)
        dk.baddbmm_(dQK.transpose(1, 2), s.q)
    else:
        dq = dout @ s.M[:, mem]
        dM[:, mem] += dout.transpose(1, 2) @ s.q
    # D = (I + L)^-1 rhs,  L = eta F KK (F carries the mask)
    d_rhs = s.inverse.transpose(1, 2) @ dD
    dL = (d_rhs @ s.D.transpose(1, 2)).neg_()
    dLF = dL.mul_(s.F)
    d_eta = (dLF * s.KK).sum(-1)
    dKK = dLF.mul_(s.eta[..., None])
    dlog = dKK * s.KK
    dG_prev = dlog.sum(2)
    dG -= dlog.sum(1)
    dk.baddbmm_(dKK + dKK.transpose(1, 2), s.k)
    # rhs = eta (r U - g_prev P)
    g_prev = s.G_prev.exp()[..., None]
    d_eta += (d_rhs * torch.addcmul(s.U * rates, s.P, g_prev, value=-1)).sum(-1)
    dT = d_rhs.mul_(s.eta[..., None])
    dP = (dT * g_prev).neg_()
    dG_prev += (dP * s.P).sum(-1)
    dk.baddbmm_(dP, s.X)
    dX.baddbmm_(dP.transpose(1, 2), s.k)
    d_rates = (dT * s.U).sum(1, keepdim=True)
    dU = dT * rates
    du = dU @ s.M
    dM.baddbmm_(dU.transpose(1, 2), s.u)
    dk -= du
    # gates: G = cumsum(log alpha), G_prev = G - log alpha, eta = alpha/2 * gate
    total = dG + dG_prev
    d_log_alpha = total.flip(-1).cumsum(-1).flip(-1) - dG_prev
    scaled_eta = d_eta * s.eta
    da = (d_log_alpha + scaled_eta) * (1 - s.alpha)
    de = scaled_eta * (1 - s.eta_gate)
    dv = _normalise_backward(du + dU[..., mem], s.v, s.v_norm)
    dxv = dv @ s.M[:, v_rows]
    dM[:, v_rows] += dv.transpose(1, 2) @ s.xv
    dy = torch.empty(*dk.shape[:2], dim + 2, dtype=dk.dtype, device=dk.device)
    dy[..., :dim] = _normalise_backward(dk, s.k, s.k_norm)
    dy[..., dim], dy[..., dim + 1] = de, da
    dxk = dy @ s.M[:, : dim + 2]
    dM[:, : dim + 2] += dy.transpose(1, 2) @ s.xk
    dxq = _normalise_backward(dq, s.q, s.q_norm)
    return _Grads(dxq, dxk, dxv, de, da, dX, dM, d_start, d_rates)


def _chunks(x: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    """[B, T, H, ...] -> list over chunks of [B*H, n, ...], contiguous."""
    B, _, H = x.shape[:3]
    return [c.transpose(1, 2).reshape(B * H, c.shape[1], *x.shape[3:]) for c in torch.split(x, chunk, dim=1)]


def _unchunk(parts: list[torch.Tensor], batch: int) -> torch.Tensor:
    """Inverse of `_chunks`."""
    heads, length = parts[0].shape[0] // batch, sum(p.shape[1] for p in parts)
    out = parts[0].new_empty(batch, length, heads, *parts[0].shape[2:])
    for part, target in zip(parts, torch.split(out, parts[0].shape[1], dim=1), strict=True):
        target.copy_(part.view(batch, heads, *part.shape[1:]).transpose(1, 2))
    return out


class ChunkScan(torch.autograd.Function):
    """Differentiable scan over whole sequences that start at a chunk boundary; see `chunk_scan`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunk after chunk; what the backward needs is kept where something needs a gradient."""
        *inputs, base, rates, X, options = args
        B, T, H, dim = inputs[0].shape
        n = min(options.chunk, T)
        strict = torch.ones(n, n, dtype=torch.bool, device=X.device).tril(-1)
        inclusive = torch.ones(n, n, dtype=torch.bool, device=X.device).tril()
        start = base if options.retain == "start" else torch.zeros_like(base)
        start_mem = start[:, rows(dim)["mem"]].repeat(B, 1, 1)
        row_rates = rates.repeat(B, 1)[:, None, :]
        X = X.reshape(B * H, *X.shape[2:])
        saved, outs = [], []
        for xq, xk, xv, e, a in zip(*(_chunks(x, options.chunk) for x in inputs), strict=True):
            m = xq.shape[1]
            M = (X.view(B, H, *X.shape[1:]) + start).view_as(X)
            out, X, keep = _forward(
                xq, xk, xv, e, a, X, M, start_mem, row_rates, strict[:m, :m], inclusive[:m, :m], options
            )  # fmt: skip
            outs.append(out)
            if any(ctx.needs_input_grad):
                saved.append(keep)
        ctx.saved, ctx.options, ctx.batch = saved, options, B
        ctx.start_mem, ctx.row_rates, ctx.dim = start_mem, row_rates, dim
        return _unchunk(outs, B), X.view(B, H, *X.shape[1:])

    @staticmethod
    @once_differentiable  # a second derivative must fail, not be wrong
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """The chunks from last to first, carrying the gradient of the state."""
        dout, dX = grads
        B, options = ctx.batch, ctx.options
        H = dout.shape[2]
        dX = dX.reshape(B * H, *dX.shape[2:])
        d_start = torch.zeros_like(dX)
        d_rates = torch.zeros_like(ctx.row_rates)
        out: list[_Grads] = []
        for saved, d in zip(reversed(ctx.saved), reversed(_chunks(dout, options.chunk)), strict=True):
            g = _backward(saved, ctx.start_mem, ctx.row_rates, d, dX, options)
            d_start += g.M
            if g.start_mem is not None:
                d_start[:, rows(ctx.dim)["mem"]] += g.start_mem
            d_rates += g.rates
            dX = g.X.add_(g.M)
            out.append(g)
        out.reverse()
        d_inputs = [_unchunk(list(parts), B) for parts in zip(*(g[:5] for g in out), strict=True)]
        d_base = d_start.view(B, H, *dX.shape[1:]).sum(0) if options.retain == "start" else None
        return *d_inputs, d_base, d_rates.view(B, H, -1).sum(0), dX.view(B, H, *dX.shape[1:]), None


def chunk_scan(
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    eta_logit: torch.Tensor,
    alpha_logit: torch.Tensor,
    base: torch.Tensor,
    rates: torch.Tensor,
    state: torch.Tensor,
    options: RuleOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan T tokens from a chunk boundary, differentiable in every tensor.

    xq, xk, xv [B, T, H, K]; eta_logit, alpha_logit [B, T, H]; base [H, R, K]; rates [H, R]; state [B, H, R, K].
    Returns outputs [B, T, H, K] and the state after the last token. T need not be a multiple of C (the last chunk is
    then left unfinished: only valid when nothing follows). Triton's or C++ kernels run it where `dispatch` allows.
    """
    tensors = [xq, xk, xv, eta_logit, alpha_logit, base, rates, state]
    if not torch.is_grad_enabled():  # a Function is not told, and would keep what its backward needs
        tensors = [tensor.detach() for tensor in tensors]
    with torch.autocast(xq.device.type, enabled=False):  # memories stay in their own precision
        fast = function("chunk_scan", xq.device.type, xq.dtype)
        if fast is not None:
            out, new = fast(*tensors, options=options)
            return out, new
        out, new = ChunkScan.apply(*tensors, options)  # type: ignore[no-untyped-call]
    return out, new
