"""Self-modifying Titans with matrix memories (NL Eq. 83-93): the fast level.

All five memories of a head share k_t, eta_t and alpha_t, so they are one gated delta rule with a (3K+2) x K state.
Slow weights project the block input to three streams; a causal depthwise convolution of width 4 gives x^q, x^k, x^v,
which the fast memories map to k, v, eta, alpha and the read. The session's state is the deviation X from the learned
start B, so the fresh state is zero at any position. Equations: `kernels/delta_rule/reference.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.chunk import chunk_scan
from nested_runtime.kernels.delta_rule.layout import RuleOptions, rows
from nested_runtime.kernels.delta_rule.segment import DeltaState, live, segment
from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.kernels.short_conv.differentiable import short_conv
from nested_runtime.memory.base import State
from nested_runtime.memory.streams import ALPHA_BIAS, GatedStreams
from nested_runtime.state.spec import TensorSpec

__all__ = ["ETA_BIAS", "SELF_RATE", "SelfModifying"]

SELF_RATE = 0.1  # r of the k, v, eta, alpha rows at the start, relative to the main memory's 1
ETA_BIAS = (1.0, 1.0)  # eta starts near alpha/2 * sigmoid(1) = 0.37


class SelfModifying(GatedStreams):
    """One layer of H heads of dimension K on a D-wide stream; the gates are eta and alpha.

    Parameters beside those of `GatedStreams`: `base` B [H, R, K], `rates` r of the four self-modifying memories [H, 4].
    """

    def __init__(self, dim: int, heads: int, head_dim: int, options: RuleOptions, conv_width: int = 4) -> None:
        super().__init__(dim, heads, head_dim, conv_width, (ETA_BIAS, ALPHA_BIAS))
        self.options = options
        base = torch.zeros(heads, 3 * head_dim + 2, head_dim)
        for name in ("k", "v"):
            base[:, rows(head_dim)[name]] += torch.eye(head_dim)
        self.base = nn.Parameter(base)
        self.rates = nn.Parameter(torch.full((heads, 4), SELF_RATE))

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

    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `UpdateRule.scan`. Whole chunks take the chunk form, the ends the segment form."""
        streams, gate, logits = self.project(x)
        fast = DeltaState(*(state[n] for n in DeltaState._fields))
        dtype = fast.anchor.dtype
        mixed, window = short_conv(streams.to(dtype), state["window"], self.conv)
        xq, xk, xv = mixed.view(*x.shape[:2], 3, self.heads, self.head_dim).unbind(2)
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
