"""Dropout of whole heads, so that no memory has to hold everything.

Training tends to put all that is remembered into one or two heads while the other memories stay empty. With heads
missing now and then, what is read has to be in several of them. What it did to hope-nano is in docs/log.md: together
with copies of heads four points more of twenty facts, but less of what a single head decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nested_runtime.memory.streams import GatedStreams

__all__ = ["HeadDropout"]


class HeadDropout:
    """Drops each head of each sequence of `model` with probability `share`, in forwards that autograd records.

    What is left is scaled by 1 / (1 - share) (Srivastava et al. 2014); a head is gone for the whole segment.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        for module in model.modules():
            if isinstance(module, GatedStreams):
                module.reads.register_forward_hook(self._drop)

    def _drop(self, module: nn.Module, args: Any, reads: torch.Tensor) -> torch.Tensor | None:
        """`reads` [B, T, H, K]; None leaves them as they are."""
        if not reads.requires_grad:
            return None
        kept = torch.rand(reads.shape[0], 1, reads.shape[2], 1, device=reads.device) >= self.share
        return reads * (kept / (1 - self.share)).to(reads.dtype)
