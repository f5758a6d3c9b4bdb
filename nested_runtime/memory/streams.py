"""What the linear memories share: three convolved streams, gates, and a gated read (as in Gated DeltaNet, 2412.06464).

Slow weights project the block input; a causal depthwise convolution and SiLU give x^q, x^k, x^v. Gate logits are
projections with a bias per head. The read is normalised per head, gated and projected back to the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

from nested_runtime.memory.base import UpdateRule

__all__ = ["ALPHA_BIAS", "GatedStreams", "unit"]

OUT_SCALE = 0.2  # of the residual stream that one layer's read makes up at the start
ALPHA_BIAS = (5.0, 10.0)  # of retention, spread over heads: half-lives from about 100 to 15,000 tokens (MODEL.md 7)
NORM_EPS = 1e-6


class GatedStreams(UpdateRule):
    """The slow weights of H heads of dimension K on a D-wide stream, with G gates per head.

    Parameters: `w_in` [3HK + HK + GH, D] (x^q, x^k, x^v, output gate, gate logits), `gate_bias` [G, H],
    `conv` [W, 3HK], `norm` [K], `w_out` [D, HK]. `gates`: first and last head's bias of every gate.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, conv_width: int, gates: Sequence[tuple[float, float]]
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.conv_width = heads, head_dim, conv_width
        inner = heads * head_dim
        self.w_in = nn.Parameter(torch.randn(4 * inner + len(gates) * heads, dim) * dim**-0.5)
        self.gate_bias = nn.Parameter(torch.stack([torch.linspace(low, high, heads) for low, high in gates]))
        self.conv = nn.Parameter(torch.randn(conv_width, 3 * inner) * 0.05)
        self.norm = nn.Parameter(torch.ones(head_dim))
        self.w_out = nn.Parameter(torch.zeros(dim, inner))
        self.gate_logits = nn.Identity()  # sees the gates' logits [.., G, H]: what training watches takes a hook here
        self._start_as_induction()

    @torch.no_grad()
    def _start_as_induction(self) -> None:
        """Start as an induction layer: x^k is x^q shifted by a token or two, and w_out undoes the value projection.

        A query then finds the tokens that followed its like, so copying is there from the first step and training only
        has to shape it; from a random start the same model had not begun to copy after 3.6M tokens (docs/log.md).
        """
        inner = self.heads * self.head_dim
        q, k, v, gate = (self.w_in[i * inner : (i + 1) * inner] for i in range(4))
        nn.init.orthogonal_(v)
        k.copy_(q)
        gate *= 0.5
        self.w_out.copy_(v.t() * OUT_SCALE)
        self.w_in[4 * inner :] *= 0.1
        self.conv[-1] += 1.0
        taps = self.conv.view(self.conv_width, 3, self.heads, self.head_dim)
        for head in range(self.heads if self.conv_width > 2 else 0):
            if head % 4 == 3:
                continue
            taps[-1, 1, head] -= 1.0
            taps[-2, 1, head] += 1.0
            if head % 4 == 1:
                taps[-2, 0, head] += 0.5
                taps[-3, 1, head] += 0.5

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [.., D] -> streams before the convolution [.., 3HK], output gate [.., HK], gate logits [.., G, H]."""
        inner, bias = self.heads * self.head_dim, self.gate_bias
        projected = linear(x, self.w_in)
        streams, gate, logits = torch.split(projected, [3 * inner, inner, bias.numel()], dim=-1)
        return streams, gate, self.gate_logits(logits.to(bias.dtype).view(*x.shape[:-1], *bias.shape) + bias)

    def finish(self, read: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Per-head RMS norm of the read [.., H, K], gated, projected back to [.., D]."""
        normed = rms_norm(read, (self.head_dim,), self.norm.to(read.dtype), eps=NORM_EPS)
        return linear(normed.flatten(-2).to(gate.dtype) * silu(gate), self.w_out)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x [.., K] over its norm."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)
