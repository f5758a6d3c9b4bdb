"""Self-modifying Titans with matrix memories (NL Eq. 83-93): the fast level.

All five memories of a head share k_t, eta_t and alpha_t, so they are one gated delta rule with a (3K+2) x K state.
Slow weights project the block input to three streams; a causal depthwise convolution of width 4 gives x^q, x^k, x^v,
which the fast memories map to k, v, eta, alpha and the read. The session's state is the deviation X from the learned
start B, so the fresh state is zero at any position. Equations: `kernels/delta_rule/reference.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.chunk import chunk_scan
from nested_runtime.kernels.delta_rule.layout import RuleOptions, rows
from nested_runtime.kernels.delta_rule.segment import DeltaState, live, segment
from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.kernels.short_conv.differentiable import short_conv
from nested_runtime.memory.base import State, UpdateRule
from nested_runtime.state.spec import TensorSpec

__all__ = ["SelfModifying"]

SELF_RATE = 0.1  # r of the k, v, eta, alpha rows at the start, relative to the main memory's 1
ETA_BIAS = 1.0  # eta starts near alpha/2 * sigmoid(1) = 0.37
OUT_SCALE = 0.2  # of the residual stream that one layer's read makes up at the start
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
        self.conv = nn.Parameter(torch.randn(conv_width, 3 * inner) * 0.05)
        self.base = nn.Parameter(torch.zeros(heads, 3 * head_dim + 2, head_dim))
        self.rates = nn.Parameter(torch.full((heads, 4), SELF_RATE))
        self.norm = nn.Parameter(torch.ones(head_dim))
        self.w_out = nn.Parameter(torch.zeros(dim, inner))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Start as an induction layer: x^k is x^q shifted by a token or two, and w_out undoes the value projection.

        A query then finds the tokens that followed its like, so copying is there from the first step and training only
        has to shape it; from a random start the same model had not begun to copy after 3.6M tokens (docs/log.md).
        """
        inner = self.heads * self.head_dim
        for name in ("k", "v"):
            self.base[:, rows(self.head_dim)[name]] += torch.eye(self.head_dim)
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

    def memory(self, state: State) -> dict[str, torch.Tensor]:
        """X after the last token, [B, H, R, K]: anchor and tail in one, without the convolution's window."""
        fast = DeltaState(*(state[name] for name in DeltaState._fields))
        shift = self.base.to(fast.anchor.dtype) if self.options.retain == "zero" else 0.0  # as in `scan`
        return {"anchor": live(fast._replace(anchor=fast.anchor + shift)) - shift}

    def row_rates(self) -> torch.Tensor:
        """r per row of the state [H, R]; the main memory's is 1."""
        k = self.head_dim
        r_k, r_eta, r_alpha, r_v = self.rates.unbind(1)
        parts = [r_k[:, None].expand(-1, k), r_eta[:, None], r_alpha[:, None], r_v[:, None].expand(-1, k)]
        return torch.cat([*parts, torch.ones_like(parts[0])], dim=1)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [.., D] -> streams before the convolution [.., 3HK], output gate [.., HK], gate logits [.., 2, H]."""
        inner = self.heads * self.head_dim
        projected = linear(x, self.w_in)
        streams, gate, logits = torch.split(projected, [3 * inner, inner, 2 * self.heads], dim=-1)
        return streams, gate, logits.to(self.gate_bias.dtype).view(*x.shape[:-1], 2, self.heads) + self.gate_bias

    def finish(self, read: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Per-head RMS norm of the read [.., H, K], gated, projected back to [.., D]."""
        normed = rms_norm(read, (self.head_dim,), self.norm.to(read.dtype), eps=1e-6).flatten(-2).to(gate.dtype)
        return linear(normed * silu(gate), self.w_out)

    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `UpdateRule.scan`. Whole chunks take the chunk form, the ends the segment form."""
        streams, gate, logits = self.project(x)
        mixed, window = short_conv(streams, state["window"], self.conv)
        fast = DeltaState(*(state[n] for n in DeltaState._fields))
        dtype = fast.anchor.dtype
        xq, xk, xv = mixed.to(dtype).view(*x.shape[:2], 3, self.heads, self.head_dim).unbind(2)
        inputs = (xq, xk, xv, logits[..., 0, :].to(dtype), logits[..., 1, :].to(dtype))
        # The kernels decay X towards zero: with retain="zero" that must be M itself, not its deviation.
        shift = self.base.to(dtype) if self.options.retain == "zero" else 0.0
        read, fast = self._scan_fast(inputs, fast._replace(anchor=fast.anchor + shift), position)
        return self.finish(read, gate), {**fast._asdict(), "anchor": fast.anchor - shift, "window": window}

    def apply_packed(self, x: torch.Tensor, pool: State, batch: Batch) -> torch.Tensor:
        """See `UpdateRule.apply_packed`. The kernels have no backward: while autograd records, the reference runs."""
        dtype = pool["anchor"].dtype
        kernels = None if torch.is_grad_enabled() else packed_kernels(x.device.type, dtype)
        if kernels is None:
            return super().apply_packed(x, pool, batch)
        streams, gate, logits = self.project(x)
        mixed = kernels.packed_conv(streams.to(dtype), pool["window"], self.conv.to(dtype), batch)
        mixed = mixed.view(-1, 3, self.heads, self.head_dim)
        base, rates = self.base.to(dtype), self.rates.to(dtype)
        read = kernels.packed_scan(mixed, logits.to(dtype), base, rates, pool, batch, self.options)
        return self.finish(read, gate)

    def _scan_fast(
        self, inputs: tuple[torch.Tensor, ...], state: DeltaState, position: int
    ) -> tuple[torch.Tensor, DeltaState]:
        base, rates = self.base.to(inputs[0].dtype), self.row_rates().to(inputs[0].dtype)
        chunk, length = self.options.chunk, inputs[0].shape[1]
        outs, begin = [], 0
        while begin < length:
            done = (position + begin) % chunk
            whole = (length - begin) // chunk * chunk
            if done == 0 and whole:
                end = begin + whole
                q, k, v, e, a = (t[:, begin:end] for t in inputs)
                out, anchor = chunk_scan(q, k, v, e, a, base, rates, state.anchor, self.options)
                state = state._replace(anchor=anchor)
            else:
                end = min(begin + chunk - done, length)
                out, state = self._segment(tuple(t[:, begin:end] for t in inputs), base, rates, state, done)
            outs.append(out)
            begin = end
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), state

    def _segment(
        self, inputs: tuple[torch.Tensor, ...], base: torch.Tensor, rates: torch.Tensor, state: DeltaState, done: int
    ) -> tuple[torch.Tensor, DeltaState]:
        batch = inputs[0].shape[0]
        xq, xk, xv, eta, alpha = (t.transpose(1, 2).flatten(0, 1) for t in inputs)
        start = base if self.options.retain == "start" else torch.zeros_like(base)
        flat = DeltaState(*(t.flatten(0, 1) for t in state))
        out, flat = segment(
            xq, xk, xv, eta, alpha, start.repeat(batch, 1, 1), rates.repeat(batch, 1), flat, done, self.options
        )  # fmt: skip
        new = DeltaState(*(t.view(batch, self.heads, *t.shape[1:]) for t in flat))
        return out.view(batch, self.heads, *out.shape[1:]).transpose(1, 2), new
