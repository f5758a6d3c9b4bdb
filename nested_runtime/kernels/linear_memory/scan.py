"""One matrix memory that decays, keeps a momentum and erases what it overwrites, over a run of tokens at once.

    d_t = w_t - e_t X_{t-1} k_t                    what is written, less what the key finds there already
    S_t = mu_t S_{t-1} + d_t k_t^T                 momentum (mu = 0: S_t = d_t k_t^T)
    X_t = alpha_t X_{t-1} + S_t                    o_t = X_t q_t

Titans (2501.00663 Eq. 13-14) is w = theta v, e = theta; Gated DeltaNet (2412.06464 Eq. 10) is mu = 0, w = beta v,
e = alpha beta; HOPE's chunk (NL Eq. 88) is w = eta r (vhat - M_a k), e = eta, and e = 0 makes it gradient descent.

With g_t = prod alpha, m_t = prod mu, A_ti = g_t/g_i and N_ij = m_i/m_j below the diagonal and on it, C = A N:

    X_t = g_t X_0 + (A m)_t S_0 + sum_j C_tj d_j k_j^T      S_t = m_t S_0 + sum_j N_tj d_j k_j^T

so the d_t solve one unit lower triangular system. Any cut of the tokens into runs gives the same X and S.
"""

from __future__ import annotations

import torch

__all__ = ["linear_scan"]


def linear_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    write: torch.Tensor,
    erase: torch.Tensor | None,
    log_alpha: torch.Tensor,
    log_mu: torch.Tensor | None,
    memory: torch.Tensor,
    momentum: torch.Tensor | None,
    rows: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Read n tokens with N memories; pure and differentiable, O(n^2) in the length of the run.

    q, k [N, n, K]; write w [N, n, R]; erase e [N, n] (None = 0); log_alpha, log_mu [N, n]; memory X_0, momentum S_0
    [N, R, K]; log_mu and momentum are None together: no momentum. Returns the reads of `rows` [N, n, |rows|], X, S.
    """
    n = q.shape[1]
    log_g = log_alpha.cumsum(1)
    decay = _ratios(log_g)
    g = log_g.exp()
    if log_mu is None or momentum is None:
        carry, reach, moved = decay, None, torch.zeros_like(memory)
    else:
        log_m = log_mu.cumsum(1)
        inertia = _ratios(log_m)
        carry, m = decay @ inertia, log_m.exp()
        reach = (decay @ m[..., None])[..., 0]
        moved = momentum
    d = write
    if erase is not None:
        found = (k @ memory.mT) * _before(g, 1.0)[..., None]
        if reach is not None:
            found = found + (k @ moved.mT) * _before(reach, 0.0)[..., None]
        seen = _before(carry, 0.0) * (k @ k.mT)
        system = torch.eye(n, dtype=q.dtype, device=q.device) + erase[..., None] * seen
        right = write - erase[..., None] * found
        d = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    out = (q @ memory[:, rows].mT) * g[..., None] + (carry * (q @ k.mT)) @ d[..., rows]
    after = memory * g[:, -1, None, None] + (d * carry[:, -1, :, None]).mT @ k
    if reach is None:
        return out, after, None
    out = out + (q @ moved[:, rows].mT) * reach[..., None]
    after = after + moved * reach[:, -1, None, None]
    return out, after, moved * m[:, -1, None, None] + (d * inertia[:, -1, :, None]).mT @ k


def _ratios(logs: torch.Tensor) -> torch.Tensor:
    """exp(l_i - l_j) for j <= i, else 0; [N, n] -> [N, n, n]."""
    n = logs.shape[1]
    later = torch.ones(n, n, dtype=torch.bool, device=logs.device).triu(1)
    return (logs[:, :, None] - logs[:, None, :]).masked_fill(later, -torch.inf).exp()


def _before(rows: torch.Tensor, first: float) -> torch.Tensor:
    """The same along time one token earlier: `first`, then all but the last."""
    return torch.cat([torch.full_like(rows[:, :1], first), rows[:, :-1]], dim=1)
