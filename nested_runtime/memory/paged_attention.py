"""Softmax attention over all tokens of a window, keys and values kept one row per token (paged while serving).

    o_t = sum_{t-W < j <= t} softmax_j(s q_t . k_j) v_j        q, k rotated by the session position

Grouped queries, biases, and an RMS norm of q and k per head are options; Llama, Qwen, Mistral and Gemma differ in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import rms_norm

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.kernels.paged_attention.reference import attend, paged_attention
from nested_runtime.memory.base import State
from nested_runtime.memory.frozen import Weight, linear
from nested_runtime.memory.rope import Rope, rotate
from nested_runtime.state.spec import TensorSpec

__all__ = ["AttentionShape", "PagedAttention"]


@dataclass(frozen=True)
class AttentionShape:
    """One layer: H query heads share G key heads of dimension K.

    window  tokens a token sees, itself included; kept: rows a session holds, at least `window`
    scale   s; None = K^-1/2
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    kept: int
    rope: Rope
    scale: float | None = None
    bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even (rotary positions turn pairs), got {self.head_dim}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")


class PagedAttention(nn.Module):
    """One layer. Parameters: `w_in` [(H+2G)K, D] (q, k, v), `w_out` [D, HK], their biases, `norm_q`, `norm_k` [K]."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        width, inner = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.heads * shape.head_dim
        self.w_in: Weight = nn.Parameter(torch.randn(width, shape.dim) * shape.dim**-0.5)
        self.w_out: Weight = nn.Parameter(torch.zeros(shape.dim, inner))
        self.b_in = nn.Parameter(torch.zeros(width)) if shape.bias else None
        self.b_out = nn.Parameter(torch.zeros(shape.dim)) if shape.out_bias else None
        self.norm_q = nn.Parameter(torch.ones(shape.head_dim)) if shape.qk_norm else None
        self.norm_k = nn.Parameter(torch.ones(shape.head_dim)) if shape.qk_norm else None
        self.scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale

    def state(self) -> tuple[TensorSpec, ...]:
        """Rotated keys and values, newest last; `filled` is 1 for every row that holds a token."""
        s = self.shape
        return (
            TensorSpec("kv", (s.kept, 2, s.kv_heads, s.head_dim), level="kv", grows=True),
            TensorSpec("filled", (s.kept,), level="kv", grows=True),
        )

    def _project(self, x: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [.., T, D], turns [T, 2, K/2] -> q [.., T, H, K] and rotated keys with values [.., T, 2, G, K]."""
        s = self.shape
        heads = linear(x, self.w_in, self.b_in).view(*x.shape[:-1], -1, s.head_dim)
        q, k, v = torch.split(heads, [s.heads, s.kv_heads, s.kv_heads], dim=-2)
        if self.norm_q is not None and self.norm_k is not None:
            q = rms_norm(q, (s.head_dim,), self.norm_q.to(q.dtype), s.norm_eps)
            k = rms_norm(k, (s.head_dim,), self.norm_k.to(k.dtype), s.norm_eps)
        return rotate(q, turns), torch.stack([rotate(k, turns), v], dim=-3)

    def scan(self, x: torch.Tensor, state: State, turns: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x [B, T, D] read from `state`, pure and differentiable -> out [B, T, D], state; `turns` see Rope.turns."""
        q, new = self._project(x, turns)
        rows = torch.cat([state["kv"], new.to(state["kv"].dtype)], dim=1)
        filled = torch.cat([state["filled"], state["filled"].new_ones(x.shape[:2])], dim=1)
        at = torch.arange(rows.shape[1], device=x.device)
        last = at[state["kv"].shape[1] :, None]
        mask = (at <= last) & (at > last - self.shape.window) & (filled > 0)[:, None]
        keys, values = rows.unbind(2)
        out = attend(q, keys, values, mask, self.scale)
        kept = {"kv": rows[:, -self.shape.kept :], "filled": filled[:, -self.shape.kept :]}
        return linear(out.flatten(2), self.w_out, self.b_out), kept

    def apply_packed(self, x: torch.Tensor, pool: State, batch: Batch, turns: torch.Tensor) -> torch.Tensor:
        """x [T, D] packed over `batch`; `pool` holds the blocks of `state()`, written in place -> [T, D]."""
        if batch.kv is None:
            raise ConfigError("attention needs a batch that says where its keys and values lie (Batch.kv)")
        q, new = self._project(x, turns)
        rows = pool["kv"].flatten(0, 1)
        rows[batch.kv.write] = new.to(rows.dtype)
        pool["filled"].view(-1)[batch.kv.write] = 1
        out = paged_attention(q, rows, batch.kv, batch.cu_seqlens, self.shape.window, self.scale)
        return linear(out.flatten(1), self.w_out, self.b_out)
