"""Deltas of sessions in slots, in torch. Tokens are packed, sequence b owns rows cu_seqlens[b]..cu_seqlens[b+1]; slot 0
adds nothing and steps nowhere.
"""

from __future__ import annotations

import torch

__all__ = ["low_rank_apply", "outer_step", "step"]


def low_rank_apply(
    x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor,
    slots: torch.Tensor, cu_seqlens: torch.Tensor,
) -> None:  # fmt: skip
    """y_t += U_s (V_0 + V_s) x_t in place; x [T, D], y [T, E], start V_0 [r, D], pools inner V [S+1, r, D], outer U
    [S+1, E, r].
    """
    bounds = cu_seqlens.tolist()
    for b, slot in enumerate(slots.tolist()):
        if slot:
            rows = slice(bounds[b], bounds[b + 1])
            y[rows] += x[rows] @ (start + inner[slot]).t() @ outer[slot].t()


def step(
    pool: torch.Tensor, gradient: torch.Tensor, slots: torch.Tensor, rate: torch.Tensor,
    momentum: torch.Tensor | None = None, mu: float = 0.0, decay: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """S_s <- mu S_s - rate_b g_b, W_s <- decay_b W_s + S_s in place (NL Eq. 33; Titans' momentum and forgetting).

    pool W, momentum S [S+1, ...] (without momentum S is -rate g), gradient [B, ...], rate, decay [B] (None: 1).
    """
    for b, slot in enumerate(slots.tolist()):
        if slot:
            move = -rate[b] * gradient[b]
            if momentum is not None:
                move = mu * momentum[slot] + move
                momentum[slot] = move
            pool[slot] = (1.0 if decay is None else decay[b]) * pool[slot] + move


def outer_step(
    pool: torch.Tensor, errors: torch.Tensor, inputs: torch.Tensor, slots: torch.Tensor, rate: torch.Tensor
) -> None:
    """W_s <- W_s - rate_b sum_n d_n x_n^T in place; pool [S+1, E, D], errors d [B, N, E], inputs x [B, N, D]."""
    for b, slot in enumerate(slots.tolist()):
        if slot:
            pool[slot] -= rate[b] * errors[b].t() @ inputs[b]
