"""The self-modifying rule with parts of it changed: the options that NL Table 6 ablates, in the general linear form.

    momentum    S_t = mu_t S_{t-1} + d_t k_t^T,  X_t = alpha_t X_{t-1} + S_t        (X_t = alpha_t X_{t-1} + d_t k_t^T)
    gd          d_t = eta_t r (vhat_t - M_a k_t): gradient descent, nothing is erased           (the DGD of NL Eq. 88)
    no-decay    alpha_t = 1
    fixed-k     M_k = B_k, learned, but no session changes it; fixed-v the same for v
    adaptive-q  q_t = l2norm(M_q x^q_t) with a memory of its own                                (q_t = l2norm(x^q_t))

Without changes it is `SelfModifying`, computed in another way. There is no compiled kernel for it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import ETA_MAX, RuleOptions, rows
from nested_runtime.kernels.linear_memory.scan import linear_scan
from nested_runtime.kernels.short_conv.differentiable import short_conv
from nested_runtime.memory.base import State, UpdateRule
from nested_runtime.memory.self_modifying import SELF_RATE, SelfModifying
from nested_runtime.memory.streams import unit
from nested_runtime.state.spec import TensorSpec

__all__ = ["CHANGES", "VariedSelfModifying"]

CHANGES = ("momentum", "gd", "no-decay", "fixed-k", "fixed-v", "adaptive-q")
MU_BIAS = (-2.0, 0.5)  # momentum of 0.12 to 0.62 over the heads


class VariedSelfModifying(SelfModifying):
    """`SelfModifying` with `changes`. Additional parameters: `w_mu` [H, D] and `mu_bias` [H]; `base_q` and `rate_q`."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, options: RuleOptions, conv_width: int = 4,
        changes: Collection[str] = (),
    ) -> None:  # fmt: skip
        if unknown := [change for change in changes if change not in CHANGES]:
            raise ConfigError(f"changes: unknown {unknown[0]!r}; known: {', '.join(CHANGES)}")
        self.changes = frozenset(changes)
        if options.retain != "start":
            raise ConfigError(f"changes need retain 'start', got {options.retain!r}")
        super().__init__(dim, heads, head_dim, options, conv_width)
        if self.has_momentum:
            self.w_mu = nn.Parameter(torch.randn(heads, dim) * 0.1 * dim**-0.5)
            self.mu_bias = nn.Parameter(torch.linspace(*MU_BIAS, heads))
        if self.adapts_q:
            self.base_q = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
            self.rate_q = nn.Parameter(torch.full((heads,), SELF_RATE))
        # Gradients at the anchor add up over a chunk, nothing being erased: a contraction (without momentum) to 1/C.
        self.eta_max = 1.0 / options.chunk if "gd" in self.changes else ETA_MAX

    @property
    def has_momentum(self) -> bool:
        """Whether the state has a momentum."""
        return "momentum" in self.changes

    @property
    def adapts_q(self) -> bool:
        """Whether there is a memory for q."""
        return "adaptive-q" in self.changes

    def state(self) -> tuple[TensorSpec, ...]:
        """State at the chunk's start, now, the momentum, the convolution window."""
        shape = (self.heads, (4 if self.adapts_q else 3) * self.head_dim + 2, self.head_dim)
        names = ("anchor", "live", "momentum") if self.has_momentum else ("anchor", "live")
        window = TensorSpec("window", (self.conv_width - 1, 3 * self.heads * self.head_dim))
        return (*(TensorSpec(name, shape) for name in names), window)

    def memory(self, state: State) -> dict[str, torch.Tensor]:
        """X after the last token."""
        return {"live": state["live"]}

    def row_rates(self) -> torch.Tensor:
        """r per row of the state [H, R]: 0 for memories that are fixed."""
        rates = super().row_rates()
        own = rows(self.head_dim)
        for change, name in (("fixed-k", "k"), ("fixed-v", "v")):
            if change in self.changes:
                rates = torch.cat([rates[:, : own[name].start], 0 * rates[:, own[name]], rates[:, own[name].stop :]], 1)
        return torch.cat([rates, self.rate_q[:, None].expand(-1, self.head_dim)], 1) if self.adapts_q else rates

    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `UpdateRule.scan`."""
        streams, gate, logits = self.project(x)
        dtype, batch = state["live"].dtype, x.shape[0]
        mixed, window = short_conv(streams.to(dtype), state["window"], self.conv)
        shape = (*x.shape[:2], 3, self.heads, self.head_dim)
        fields = [*mixed.view(shape).unbind(2), *logits.to(dtype).unbind(2)]
        if self.has_momentum:
            fields.append((x @ self.w_mu.t().to(x.dtype)).to(dtype) + self.mu_bias.to(dtype))
        inputs = [t.transpose(1, 2).flatten(0, 1) for t in fields]
        fast = {name: state[name].flatten(0, 1) for name in ("anchor", "live", "momentum") if name in state}
        outs, begin, chunk = [], 0, self.options.chunk
        with torch.autocast(x.device.type, enabled=False):  # memories stay in their own precision
            while begin < x.shape[1]:
                done = (position + begin) % chunk
                end = min(begin + chunk - done, x.shape[1])
                if done == 0:
                    fast["anchor"] = fast["live"]
                outs.append(self._run([t[:, begin:end] for t in inputs], fast, batch))
                begin = end
        read = torch.cat(outs, dim=1).view(batch, self.heads, x.shape[1], self.head_dim).transpose(1, 2)
        return self.finish(read, gate), {"window": window, **{n: t.view_as(state[n]) for n, t in fast.items()}}

    def apply_packed(self, x: torch.Tensor, pool: State, batch: Batch) -> torch.Tensor:
        """See `UpdateRule.apply_packed`: the general path."""
        return UpdateRule.apply_packed(self, x, pool, batch)

    def _run(self, inputs: list[torch.Tensor], fast: dict[str, torch.Tensor], batch: int) -> torch.Tensor:
        """Read tokens of one chunk [N, n, ..] and renew `fast`; the reads [N, n, K]."""
        xq, xk, xv, eta_logit, alpha_logit, *mu_logit = inputs
        own, dim, dtype = rows(self.head_dim), self.head_dim, xq.dtype
        base = torch.cat([self.base, self.base_q], 1) if self.adapts_q else self.base
        base, rates = base.to(dtype).repeat(batch, 1, 1), self.row_rates().to(dtype).repeat(batch, 1)
        memory = base + fast["anchor"]
        y = xk @ memory[:, : dim + 2].mT
        k, v = unit(y[..., :dim]), unit(xv @ memory[:, own["v"]].mT)
        q = unit(xq @ memory[:, own["mem"].stop :].mT) if self.adapts_q else unit(xq)
        log_alpha = logsigmoid(alpha_logit + y[..., dim + 1])
        log_alpha = torch.zeros_like(log_alpha) if "no-decay" in self.changes else log_alpha
        eta = self.eta_max * log_alpha.exp() * torch.sigmoid(eta_logit + y[..., dim])
        error = (v - k) @ memory.mT
        error = torch.cat(
            [error[..., : own["mem"].start], error[..., own["mem"]] + v, error[..., own["mem"].stop :]], -1
        )
        read, fast["live"], momentum = linear_scan(
            q, k, eta[..., None] * error * rates[:, None], None if "gd" in self.changes else eta, log_alpha,
            logsigmoid(mu_logit[0]) if mu_logit else None, fast["live"], fast.get("momentum"), own["mem"],
        )  # fmt: skip
        if momentum is not None:
            fast["momentum"] = momentum
        if self.options.read == "anchor":
            return q @ memory[:, own["mem"]].mT
        return read + q @ base[:, own["mem"]].mT
