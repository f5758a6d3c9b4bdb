"""Slots rounded to int8 and back, in torch. pool [S+1, ..., K]; slots [B] int32, 0 = padding, left alone.

int8 is symmetric with one scale per row of K numbers: x = scale q, scale = max |x| / 127, q rounded half up.
"""

from __future__ import annotations

import torch

__all__ = ["pack_int8", "unpack_int8"]


def pack_int8(pool: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers [B, ..., K] and float32 scales [B, ...] of the slots."""
    x = pool[slots.long()]
    scale = x.abs().amax(-1) / 127
    q = torch.floor(x / scale.clamp(min=1e-30)[..., None] + 0.5)
    return q.clamp(-127, 127).to(torch.int8), scale.float()


def unpack_int8(q: torch.Tensor, scale: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> None:
    """pool[slots] <- scale q where the slot is not 0."""
    kept = slots > 0
    pool[slots[kept].long()] = (q[kept] * scale[kept][..., None]).to(pool.dtype)
