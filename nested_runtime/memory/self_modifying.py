"""Self-modifying Titans with matrix memories (NL Eq. 83-93): the fast level.

All five memories of a head share k_t, eta_t and alpha_t, so they are one gated delta rule with a (3K+2) x K state.
Slow weights project the block input to three streams; a causal depthwise convolution of width 4 gives x^q, x^k, x^v,
which the fast memories map to k, v, eta, alpha and the read. The session's state is the deviation X from the learned
start B (retain="start"), so the fresh state is zero. Equations: `kernels/delta_rule/reference.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

from nested_runtime.kernels.delta_rule.chunk import chunk_scan
from nested_runtime.kernels.delta_rule.layout import RuleOptions, rows
from nested_runtime.kernels.delta_rule.segment import DeltaState, segment
from nested_runtime.kernels.short_conv.reference import short_conv
from nested_runtime.memory.base import State, UpdateRule
from nested_runtime.state.spec import TensorSpec

__all__ = ["SelfModifying"]

SELF_RATE = 0.1  # r of the k, v, eta, alpha rows at the start, relative to the main memory's 1
ETA_BIAS = -1.0  # eta starts near alpha/2 * sigmoid(-1) = 0.13
ALPHA_BIAS = (5.0, 10.0)  # spread over heads: half-lives from about 100 to 15,000 tokens (MODEL.md section 7)


class SelfModifying(UpdateRule):
    """One layer of H heads of dimension K on a D-wide stream.

    Parameters: `w_in` [3HK + HK + 2H, D] (x^q, x^k, x^v, output gate, eta and alpha logits), `conv` [W, 3HK],
    `base` B [H, R, K], `rates` r of the four self-modifying memories [H, 4], `norm` [K], `w_out` [D, HK].
    """

    def __init__(self, dim: int, heads: int, head_dim: int, options: RuleOptions, conv_width: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.options, self.conv_width = heads, head_dim, options, conv_width
        inner = heads * head_dim
        self.w_in = nn.Parameter(torch.randn(4 * inner + 2 * heads, dim) * dim**-0.5)
        self.gate_bias = nn.Parameter(torch.zeros(2, heads))
        self.conv = nn.Parameter(torch.randn(conv_width, 3 * inner) * 0.2)
        self.base = nn.Parameter(torch.zeros(heads, 3 * head_dim + 2, head_dim))
        self.rates = nn.Parameter(torch.full((heads, 4), SELF_RATE))
        self.norm = nn.Parameter(torch.ones(head_dim))
        self.w_out = nn.Parameter(torch.zeros(dim, inner))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        self.conv[-1] += 1.0
        for name in ("k", "v", "mem"):
            self.base[:, rows(self.head_dim)[name]] += torch.eye(self.head_dim)
        self.w_in[-2 * self.heads :] *= 0.1
        self.gate_bias[0] = ETA_BIAS
        self.gate_bias[1] = torch.linspace(*ALPHA_BIAS, self.heads)

    def state(self) -> tuple[TensorSpec, ...]:
        """Anchor, unfinished tail in factors, convolution window."""
        h, k, c = self.heads, self.head_dim, self.options.chunk
        r = 3 * k + 2
        return (
            TensorSpec("anchor", (h, r, k)),
            TensorSpec("tail_k", (h, c, k)),
            TensorSpec("tail_d", (h, c, r)),
            TensorSpec("tail_g", (h, c)),
            TensorSpec("window", (self.conv_width - 1, 3 * h * k)),
        )

    def row_rates(self) -> torch.Tensor:
        """r per row of the state [H, R]; the main memory's is 1."""
        k = self.head_dim
        r_k, r_eta, r_alpha, r_v = self.rates.unbind(1)
        parts = [r_k[:, None].expand(-1, k), r_eta[:, None], r_alpha[:, None], r_v[:, None].expand(-1, k)]
        return torch.cat([*parts, torch.ones_like(parts[0])], dim=1)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [.., D] -> streams before the convolution [.., 3HK], output gate [.., HK], gate logits [.., 2, H]."""
        inner = self.heads * self.head_dim
        streams, gate, logits = linear(x, self.w_in).split([3 * inner, inner, 2 * self.heads], dim=-1)
        logits = logits.to(self.gate_bias.dtype).unflatten(-1, (2, self.heads)) + self.gate_bias
        return streams, gate, logits

    def finish(self, read: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Per-head RMS norm of the read [.., H, K], gated, projected back to [.., D]."""
        normed = rms_norm(read, (self.head_dim,), self.norm, eps=1e-6).flatten(-2).to(gate.dtype)
        return linear(normed * silu(gate), self.w_out)

    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `UpdateRule.scan`. Whole chunks take the chunk form, the ends the segment form."""
        streams, gate, logits = self.project(x)
        mixed, window = short_conv(streams, state["window"], self.conv)
        xq, xk, xv = mixed.to(self.base.dtype).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        inputs = (xq, xk, xv, logits[..., 0, :], logits[..., 1, :])
        fast = DeltaState(*(state[n] for n in DeltaState._fields))
        if self.options.retain == "zero" and position == 0:
            fast = fast._replace(anchor=self.base.expand_as(fast.anchor))
        read, fast = self._scan_fast(inputs, fast, position)
        return self.finish(read, gate), {**fast._asdict(), "window": window}

    def _scan_fast(
        self, inputs: tuple[torch.Tensor, ...], state: DeltaState, position: int
    ) -> tuple[torch.Tensor, DeltaState]:
        chunk, length = self.options.chunk, inputs[0].shape[1]
        outs, begin = [], 0
        while begin < length:
            done = (position + begin) % chunk
            whole = (length - begin) // chunk * chunk
            if done == 0 and whole:
                end = begin + whole
                out, anchor = chunk_scan(
                    *(t[:, begin:end] for t in inputs), self.base, self.row_rates(), state.anchor, self.options
                )  # fmt: skip
                state = state._replace(anchor=anchor)
            else:
                end = min(begin + chunk - done, length)
                out, state = self._segment(tuple(t[:, begin:end] for t in inputs), state, done)
            outs.append(out)
            begin = end
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), state

    def _segment(
        self, inputs: tuple[torch.Tensor, ...], state: DeltaState, done: int
    ) -> tuple[torch.Tensor, DeltaState]:
        batch = inputs[0].shape[0]
        xq, xk, xv, eta, alpha = (t.transpose(1, 2).flatten(0, 1) for t in inputs)
        start = self.base if self.options.retain == "start" else torch.zeros_like(self.base)
        start, rates = start.repeat(batch, 1, 1), self.row_rates().repeat(batch, 1)
        flat = DeltaState(*(t.flatten(0, 1) for t in state))
        out, flat = segment(xq, xk, xv, eta, alpha, start, rates, flat, done, self.options)
        shape = (batch, self.heads)
        return out.unflatten(0, shape).transpose(1, 2), DeltaState(*(t.unflatten(0, shape) for t in flat))
