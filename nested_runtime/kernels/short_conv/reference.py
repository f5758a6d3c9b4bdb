"""Causal depthwise convolution of width W with a carried window, then SiLU, from the equation alone.

y_t,c = silu(sum_i w_i,c x_{t-W+1+i},c)         window = the W-1 inputs before the first token (zeros when fresh)
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

__all__ = ["short_conv"]


def short_conv(x: torch.Tensor, window: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, F], window [B, W-1, F], weight [W, F] -> y [B, T, F], the next window [B, W-1, F]."""
    padded = torch.cat([window.to(x.dtype), x], dim=1)
    taps = padded.unfold(1, weight.shape[0], 1)  # [B, T, F, W]
    return silu((taps * weight.to(x.dtype).t()).sum(-1)), padded[:, x.shape[1] :].to(window.dtype)
