"""The rule for any run of tokens inside one chunk, continuing an unfinished tail: the exact general form.

State of one head: `anchor` X_0 [R, K], and of the p tokens read since the chunk began their factors `tail_k` [C, K],
`tail_d` [C, R] and `tail_g` [C] (log g), so that X_t = g_t X_0 + sum_j (g_t / g_j) d_j k_j^T. Rows from p on are zero.
Keeping factors instead of a second full copy makes the state smaller and a decode step read-mostly: the anchor is
written once per chunk. When the chunk is full it is folded: X_0 <- X_C, tail <- 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions, rows

__all__ = ["DeltaState", "fold", "live", "segment"]


class DeltaState(NamedTuple):
    """Anchor [N, R, K] and tail factors [N, C, K], [N, C, R], [N, C] of N heads."""

    anchor: torch.Tensor
    tail_k: torch.Tensor
    tail_d: torch.Tensor
    tail_g: torch.Tensor


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


def fold(state: DeltaState) -> DeltaState:
    """Close a full chunk: the live state becomes the anchor, the tail becomes zero."""
    last = state.tail_g[:, -1:]
    weighted = state.tail_d * (last - state.tail_g).exp()[..., None]
    anchor = state.anchor * last.exp()[..., None] + weighted.transpose(1, 2) @ state.tail_k
    return DeltaState(anchor, *(torch.zeros_like(t) for t in state[1:]))


def live(state: DeltaState) -> torch.Tensor:
    """X_t [.., R, K] of a state with any number of tokens in its tail; leading axes are free."""
    last = state.tail_g.amin(-1)  # log g falls from token to token, and rows without a token are zero
    weighted = state.tail_d * (last[..., None] - state.tail_g).exp()[..., None]
    return state.anchor * last.exp()[..., None, None] + weighted.transpose(-1, -2) @ state.tail_k


def segment(
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    eta_logit: torch.Tensor,
    alpha_logit: torch.Tensor,
    start: torch.Tensor,
    rates: torch.Tensor,
    state: DeltaState,
    done: int,
    options: RuleOptions,
) -> tuple[torch.Tensor, DeltaState]:
    """Read n tokens that all fall in the present chunk, of which `done` tokens are in the tail (done + n <= C).

    xq, xk, xv [N, n, K]; eta_logit, alpha_logit [N, n]; start [N, R, K] (B for retain="start", zeros for "zero");
    rates [N, R]. Returns outputs [N, n, K] and the state, folded if the chunk is full. Pure and differentiable.
    """
    dim, n = xq.shape[-1], xq.shape[1]
    row, stop = rows(dim), done + n
    memory = start + state.anchor
    y = xk @ memory[:, : dim + 2].transpose(1, 2)
    k, q = _unit(y[..., :dim]), _unit(xq)
    v = _unit(xv @ memory[:, row["v"]].transpose(1, 2))
    alpha_logit = alpha_logit + y[..., dim + 1]
    log_alpha = logsigmoid(alpha_logit)
    eta = ETA_MAX * torch.sigmoid(alpha_logit) * torch.sigmoid(eta_logit + y[..., dim])
    before = state.tail_g[:, done - 1 : done] if done else torch.zeros_like(log_alpha[:, :1])
    g = before + log_alpha.cumsum(1)
    g_prev = g - log_alpha
    old_k, old_d, old_g = state.tail_k[:, :done], state.tail_d[:, :done], state.tail_g[:, :done]
    error = (v - k) @ memory.transpose(1, 2)
    error = torch.cat([error[..., : row["mem"].start], error[..., row["mem"]] + v], dim=-1)
    target = error * rates[:, None]
    seen = (k @ state.anchor.transpose(1, 2)) * g_prev.exp()[..., None]
    seen = seen + ((k @ old_k.transpose(1, 2)) * (g_prev[..., None] - old_g[:, None]).exp()) @ old_d
    ratio = (g_prev[..., None] - g[:, None]).masked_fill(~_mask(n, xq, -1), -torch.inf).exp()
    system = torch.eye(n, dtype=xq.dtype, device=xq.device) + eta[..., None] * ratio * (k @ k.transpose(1, 2))
    d = torch.linalg.solve_triangular(system, eta[..., None] * (target - seen), upper=False, unitriangular=True)
    tail = DeltaState(
        state.anchor,
        torch.cat([old_k, k, state.tail_k[:, stop:]], 1),
        torch.cat([old_d, d, state.tail_d[:, stop:]], 1),
        torch.cat([old_g, g, state.tail_g[:, stop:]], 1),
    )
    if options.read == "token":
        out = _read(q, g, start[:, row["mem"]], tail, done, stop)
    else:
        out = q @ memory[:, row["mem"]].transpose(1, 2)
    return out, fold(tail) if stop == options.chunk else tail


def _mask(n: int, like: torch.Tensor, diagonal: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=like.device).tril(diagonal)


def _read(
    q: torch.Tensor, g: torch.Tensor, start: torch.Tensor, tail: DeltaState, done: int, stop: int
) -> torch.Tensor:
    """o_t = B q_t + g_t X_0 q_t + sum_{j<=t} (g_t / g_j) (k_j.q_t) d_j over the memory's value rows."""
    mem = rows(q.shape[-1])["mem"]
    visible = torch.ones(stop - done, stop, dtype=torch.bool, device=q.device).tril(done)
    ratio = (g[..., None] - tail.tail_g[:, None, :stop]).masked_fill(~visible, -torch.inf).exp()
    weights = (q @ tail.tail_k[:, :stop].transpose(1, 2)) * ratio
    out = q @ start.transpose(1, 2) + (q @ tail.anchor[:, mem].transpose(1, 2)) * g.exp()[..., None]
    return out + weights @ tail.tail_d[:, :stop, mem]
