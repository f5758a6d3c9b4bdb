"""Sliding-window attention as a rule: the memory that keeps the last W tokens verbatim and forgets the rest.

    o_t = sum_{t-W < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j        q, k rotated by the session position (RoPE)

Rotary scores depend on distances only, so keys are stored rotated. The state is a ring: token t lies at index t % W,
however the tokens were split. `filled` says which entries hold a token, so that all zeros is the fresh state at any
position.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from nested_runtime.errors import ConfigError
from nested_runtime.memory.base import State, UpdateRule
from nested_runtime.state.spec import TensorSpec

__all__ = ["SlidingAttention"]

ROPE_BASE = 10_000.0


class SlidingAttention(UpdateRule):
    """One layer of H heads of dimension K (even) on a D-wide stream; a token sees `window` tokens.

    Parameters: `w_in` [3HK, D] (q, k, v), `w_out` [D, HK].
    """

    def __init__(self, dim: int, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        if head_dim % 2:
            raise ConfigError(f"head_dim must be even (rotary positions turn pairs), got {head_dim}")
        self.heads, self.head_dim, self.window = heads, head_dim, window
        self.w_in = nn.Parameter(torch.randn(3 * heads * head_dim, dim) * dim**-0.5)
        self.w_out = nn.Parameter(torch.zeros(dim, heads * head_dim))

    def state(self) -> tuple[TensorSpec, ...]:
        """The ring of rotated keys and values, and which of its entries are filled (0 or 1)."""
        return (
            TensorSpec("ring", (2, self.heads, self.window, self.head_dim), level="kv"),
            TensorSpec("filled", (self.window,), level="kv"),
        )

    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `UpdateRule.scan`."""
        at = torch.arange(position, position + x.shape[1], device=x.device)
        q, k, v = linear(x, self.w_in).view(*x.shape[:2], 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, at), rotate(k, at)
        new = torch.stack([k, v], dim=1)
        keys, values = torch.cat([state["ring"].to(v.dtype), new], dim=3).unbind(1)
        mask = self._visible(state["filled"], at)
        out = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return linear(out.transpose(1, 2).flatten(2), self.w_out), self._store(state, new, at)

    def _visible(self, filled: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """filled [B, W], at [T] -> [B, 1, T, W+T]: which ring entries and new tokens each new token sees."""
        last = at[0] - 1
        held = last - (last - torch.arange(self.window, device=at.device)) % self.window
        where = torch.cat([held, at])
        near = (where <= at[:, None]) & (where > at[:, None] - self.window)
        known = torch.cat([filled > 0, filled.new_ones(filled.shape[0], len(at), dtype=torch.bool)], dim=1)
        return (near & known[:, None])[:, None]

    def _store(self, state: State, new: torch.Tensor, at: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = new[:, :, :, -self.window :].to(state["ring"].dtype)
        index = at[-self.window :] % self.window
        return {
            "ring": state["ring"].index_copy(3, index, kept),
            "filled": state["filled"].index_fill(1, index, 1.0),
        }


def rotate(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """x [.., T, K] turned by the positions at [T] (RoPE, arXiv 2104.09864): pairs are (i, i + K/2)."""
    half = x.shape[-1] // 2
    # float64: at position 10^6 a float32 angle is wrong by 0.06
    speed = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = at[:, None].double() * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
