"""The gated MLP of Llama-type models: W_2 (sigma(W_g z) * W_u z), sigma SiLU or GELU (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from nested_runtime.errors import ConfigError
from nested_runtime.memory.frozen import Weight, linear
from nested_runtime.memory.level import Change, keep

__all__ = ["ACTIVATIONS", "GatedMLP"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


class GatedMLP(nn.Module):
    """Parameters: `w_in` [2F, D] (gate, up), `w_out` [D, F], and their biases if `bias`."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"config field 'activation' is {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.w_in: Weight = nn.Parameter(torch.randn(2 * hidden, dim) * dim**-0.5)
        self.w_out: Weight = nn.Parameter(torch.zeros(dim, hidden))
        self.b_in = nn.Parameter(torch.zeros(2 * hidden)) if bias else None
        self.b_out = nn.Parameter(torch.zeros(dim)) if bias else None

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.w_in.dtype

    def forward(self, z: torch.Tensor, change: Change = keep) -> torch.Tensor:
        """z [.., D] -> [.., D]; `change` adds sessions' deltas to `w_in` ("up": gate and up) and `w_out` ("down")."""
        gate, up = change("up", z, linear(z, self.w_in, self.b_in)).chunk(2, dim=-1)
        hidden = self.activation(gate) * up
        return change("down", hidden, linear(hidden, self.w_out, self.b_out))
