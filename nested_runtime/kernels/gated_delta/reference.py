"""The gated delta rule token by token, from the equation alone (arXiv 2412.06464; NL Eq. 88, one memory).

    S_t = alpha_t S_{t-1} + eta_t (v_t - S_{t-1} k_t) k_t^T          o_t = S_t q_t

The error is that of the state before decay, as DGD has it: Gated DeltaNet's beta and v are eta / alpha and alpha v.
Differentiable, dtype-preserving, slow: the oracle of `triton.py`.
"""

from __future__ import annotations

import torch

__all__ = ["gated_delta"]


def gated_delta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_alpha: torch.Tensor, eta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], log_alpha, eta [B, T, H], state [B, H, V, K] -> o [B, T, H, V], last state."""
    outs = []
    for t in range(q.shape[1]):
        error = v[:, t] - torch.einsum("bhvk,bhk->bhv", state, k[:, t])
        write = torch.einsum("bhv,bhk->bhvk", eta[:, t, :, None] * error, k[:, t])
        state = log_alpha[:, t].exp()[..., None, None] * state + write
        outs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1), state
