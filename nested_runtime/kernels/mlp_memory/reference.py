"""Gradients of the MLP memory over a chunk, from the equations (MODEL.md section 2, Titans arXiv 2501.00663).

    a = W_2 k,  h = gelu(a),  e = k + W_1 h - v                       1/2 ||M(k) - v||^2
    G_1 = sum_t theta_t e_t h_t^T          G_2 = sum_t theta_t (W_1^T e_t * gelu'(a_t)) k_t^T

Momentum and decay of the step are `levels.step`: S <- mu S - G, W <- alpha W + S.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu

__all__ = ["chunk_gradient"]


def chunk_gradient(
    k: torch.Tensor, v: torch.Tensor, theta: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [B, C, H, D], theta [B, C, H] (0: the token does not count), pools w1 [S+1, H, D, F], w2 [S+1, H, F, D].

    Returns G_1 [B, H, D, F], G_2 [B, H, F, D]; zero for padding.
    """
    first, second = w1[slots.long()], w2[slots.long()]
    a = torch.einsum("bhfd,bchd->bchf", second, k)
    h = gelu(a)
    error = (k + torch.einsum("bhdf,bchf->bchd", first, h) - v) * theta[..., None]
    slope = 0.5 * (1 + torch.erf(a / 2**0.5)) + a * torch.exp(-0.5 * a * a) / (2 * torch.pi) ** 0.5
    back = torch.einsum("bhdf,bchd->bchf", first, error) * slope
    kept = (slots > 0).to(k.dtype).view(-1, 1, 1, 1)
    grads = torch.einsum("bchd,bchf->bhdf", error, h), torch.einsum("bchf,bchd->bhfd", back, k)
    return grads[0] * kept, grads[1] * kept
