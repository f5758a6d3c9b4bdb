"""Self-modifying Titans with deep memories and momentum: the options of `SelfModifying` that its kernels do not have.

Memories are matrices, as there, or with `hidden` F residual MLPs (NL section 8; Titans 3.1) of two layers each

    M_m(z) = z + W_1,m gelu(W_2,m z),  m in {k, v, mem};   M_eta and M_alpha stay rows that multiply z

Anchor a, keys, values, eta, alpha and targets vhat_m = M_m,a(v_t) are as in `kernels/delta_rule/reference.py`. With
e = M_m,a(k_t) - vhat_m,t and h = gelu(W_2 k_t), all at the anchor, the gradients of 1/2 ||e||^2 are

    G_1 = e h^T        G_2 = (W_1^T e * gelu'(W_2 k_t)) k_t^T

and every layer W with input x (k_t, or h) erases along it and steps by itself, X being its deviation from the start:

    S_t = mu_t S_t-1 - r_m eta_x G        X_t = X_t-1 (alpha_t I - eta_x x x^T) + S_t        Titans Eq. 13-14, NL Eq. 88

with eta_x = eta_t / (1 + eta_t ||x||^2) (NL App. C), eta_t itself for matrices; mu_t = sigmoid(w_mu x_t + b) with
`momentum`, else 0. So without both options this is `SelfModifying`. Within a chunk tokens are taken one by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu, linear

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions, rows
from nested_runtime.kernels.short_conv.differentiable import short_conv
from nested_runtime.memory.base import State, UpdateRule
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.state.spec import TensorSpec

__all__ = ["DeepSelfModifying", "gelu_slope", "mlp_gradients"]

MU_BIAS = 0.0  # of momentum: a half-life of one token at the start
DEEP = ("k", "v", "mem")  # memories that are MLPs


def gelu_slope(x: torch.Tensor) -> torch.Tensor:
    """d gelu / dx = Phi(x) + x phi(x)."""
    slope: torch.Tensor = 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return slope


def mlp_gradients(
    outer: torch.Tensor, pre: torch.Tensor, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of the gradients of 1/2 ||z + W_1 gelu(W_2 z) - target||^2.

    outer W_1 [.., K, F], pre W_2 z [.., F], error [.., K] -> e [.., K] and h [.., F] with dW_1 = e h^T, and
    d [.., F] with dW_2 = d z^T.
    """
    return error, gelu(pre), (outer.transpose(-1, -2) @ error[..., None])[..., 0] * gelu_slope(pre)


class Layer(NamedTuple):
    """One kind of weight: deviations X and momenta S, both [B, H, .., out, in]."""

    live: torch.Tensor
    step: torch.Tensor | None


class Drive(NamedTuple):
    """What moves a layer in a chunk of n tokens: its input x [B, n, H, .., in], r times the error factor of the
    gradient [B, n, H, .., out], and eta_x [B, n, H, ..]."""

    x: torch.Tensor
    error: torch.Tensor
    eta: torch.Tensor


class DeepSelfModifying(SelfModifying):
    """Parameters beside those of `SelfModifying`: where memories are MLPs of width `hidden` (None = matrices) `base` is
    W_2 [H, 3F+2, K] and `outer` W_1 [H, 3, K, F]; with `momentum` `w_mu` [H, D] and `mu_bias` [H]."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, options: RuleOptions, conv_width: int = 4, *,
        hidden: int | None = None, momentum: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, head_dim, options, conv_width)
        if hidden is not None and hidden < 1:
            raise ConfigError(f"memory_hidden must be at least 1, or left out for matrix memories, got {hidden}")
        self.hidden, self.momentum = hidden, momentum
        if hidden is not None:
            first = torch.randn(heads, 3 * hidden + 2, head_dim) * head_dim**-0.5
            for name in ("eta", "alpha"):
                first[:, rows(hidden)[name]] = 0
            self.base = nn.Parameter(first)
            self.outer = nn.Parameter(torch.zeros(heads, 3, head_dim, hidden))
        if momentum:
            self.w_mu = nn.Parameter(torch.zeros(heads, dim))
            self.mu_bias = nn.Parameter(torch.full((heads,), MU_BIAS))

    @property
    def width(self) -> int:
        """Rows of the first layer of one memory."""
        return self.hidden or self.head_dim

    def state(self) -> tuple[TensorSpec, ...]:
        """Per layer the deviation, its anchor and the momentum; the convolution's window."""
        shapes: dict[str, tuple[int, ...]] = {"inner": (self.heads, 3 * self.width + 2, self.head_dim)}
        if self.hidden is not None:
            shapes["outer"] = (self.heads, 3, self.head_dim, self.hidden)
        kinds = ("live", "anchor", "step") if self.momentum else ("live", "anchor")
        specs = [TensorSpec(f"{kind}.{name}", shape) for name, shape in shapes.items() for kind in kinds]
        return (*specs, TensorSpec("window", (self.conv_width - 1, 3 * self.heads * self.head_dim)))

    def memory(self, state: State) -> dict[str, torch.Tensor]:
        """The deviations X of the layers."""
        return {name: tensor for name, tensor in state.items() if name.startswith("live.")}

    def apply_packed(self, x: torch.Tensor, pool: State, batch: Batch) -> torch.Tensor:
        """See `UpdateRule.apply_packed`: gather, scan, scatter."""
        return UpdateRule.apply_packed(self, x, pool, batch)

    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `UpdateRule.scan`."""
        streams, gate, logits = self.project(x)
        mixed, window = short_conv(streams, state["window"], self.conv)
        dtype = state["live.inner"].dtype
        q, k, v = mixed.to(dtype).view(*x.shape[:2], 3, self.heads, self.head_dim).unbind(2)
        inputs = [q, k, v, logits.to(dtype)]
        if self.momentum:
            inputs.append(torch.sigmoid(linear(x, self.w_mu) + self.mu_bias).to(dtype))
        now = {name: t for name, t in state.items() if name != "window"} | self._shift(state, 1)
        outs, begin = [], 0
        while begin < x.shape[1]:
            done = (position + begin) % self.options.chunk
            if done == 0:
                now |= {f"anchor.{name}": now[f"live.{name}"].clone() for name in self._starts()}
            end = min(begin + self.options.chunk - done, x.shape[1])
            out, now = self._chunk([t[:, begin:end] for t in inputs], now)
            outs.append(out)
            begin = end
        return self.finish(torch.cat(outs, dim=1), gate), {**now, **self._shift(now, -1), "window": window}

    # ---- one chunk, or a part of it ---------------------------------------------------------------------------------

    def _starts(self) -> dict[str, torch.Tensor]:
        return {"inner": self.base} if self.hidden is None else {"inner": self.base, "outer": self.outer}

    def _shift(self, state: State, sign: int) -> dict[str, torch.Tensor]:
        """With retain="zero" M itself decays: the start is put into the deviation while it is worked on."""
        if self.options.retain == "start":
            return {}
        starts = self._starts().items()
        return {
            f"{k}.{n}": state[f"{k}.{n}"] + sign * start.to(state[f"{k}.{n}"].dtype)
            for n, start in starts
            for k in ("live", "anchor")
        }

    def _weights(self, state: State, kind: str) -> dict[str, torch.Tensor]:
        """The memories' weights [B, H, ..]: at the anchor, or live."""
        keeps = self.options.retain == "start"
        return {
            n: state[f"{kind}.{n}"] + (w.to(state[f"{kind}.{n}"].dtype) if keeps else 0)
            for n, w in self._starts().items()
        }

    def _pre(self, weights: State, z: torch.Tensor) -> torch.Tensor:
        """The first layer's output [B, n, H, R] for z [B, n, H, K]."""
        return torch.einsum("bhrk,bnhk->bnhr", weights["inner"], z)

    def _out(self, weights: State, pre: torch.Tensor, z: torch.Tensor, name: str) -> torch.Tensor:
        """M_name(z) [B, n, H, K]."""
        of_memory = pre[..., rows(self.width)[name]]
        if self.hidden is None:
            return of_memory
        return z + torch.einsum("bhkf,bnhf->bnhk", weights["outer"][:, :, DEEP.index(name)], gelu(of_memory))

    def _chunk(self, inputs: list[torch.Tensor], state: State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        xq, xk, xv, logits, *momentum = inputs
        at = self._weights(state, "anchor")
        row = rows(self.width)
        from_k, from_v = self._pre(at, xk), self._pre(at, xv)
        k, v = unit(self._out(at, from_k, xk, "k")), unit(self._out(at, from_v, xv, "v"))
        alpha = torch.sigmoid(logits[..., 1, :] + from_k[..., row["alpha"]].squeeze(-1))
        eta = ETA_MAX * alpha * torch.sigmoid(logits[..., 0, :] + from_k[..., row["eta"]].squeeze(-1))
        drives = self._drives(at, k, v, eta)
        layers = {n: Layer(state[f"live.{n}"], state.get(f"step.{n}")) for n in drives}
        outs = []
        for t in range(xq.shape[1]):
            mu = momentum[0][:, t] if momentum else None
            layers = {n: advance(layers[n], drives[n], t, alpha[:, t], mu) for n in layers}
            live = self._weights({f"live.{n}": layer.live for n, layer in layers.items()}, "live")
            read, q = live if self.options.read == "token" else at, unit(xq[:, t : t + 1])
            outs.append(self._out(read, self._pre(read, q), q, "mem"))
        new = dict(state) | {f"live.{n}": layer.live for n, layer in layers.items()}
        new |= {f"step.{n}": layer.step for n, layer in layers.items() if layer.step is not None}
        return torch.cat(outs, dim=1), new

    def _drives(self, at: State, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor) -> dict[str, Drive]:
        """What moves each layer, gradients taken at the anchor."""
        row, rates = rows(self.width), self.width_rates().to(k.dtype)
        pre, target = self._pre(at, k), self._pre(at, v)
        error = pre - target
        if self.hidden is None:
            error[..., row["mem"]] -= v
            return {"inner": Drive(k, error * rates, eta)}
        outer_errors, inputs = [], []
        for name in DEEP:
            wrong = self._out(at, pre, k, name) - self._out(at, target, v, name)
            outer = at["outer"][:, None, :, DEEP.index(name)]
            e, h, d = mlp_gradients(outer, pre[..., row[name]], wrong)
            error[..., row[name]] = d
            outer_errors.append(e * rates[:, row[name]][:, :1])
            inputs.append(h)
        h = torch.stack(inputs, dim=-2)
        local = eta[..., None] / (1 + eta[..., None] * h.square().sum(-1))
        first = Drive(k, error * rates, eta / (1 + eta * k.square().sum(-1)))
        return {"inner": first, "outer": Drive(h, torch.stack(outer_errors, dim=-2), local)}

    def width_rates(self) -> torch.Tensor:
        """r per row of the first layer [H, R]; the main memory's is 1."""
        r_k, r_eta, r_alpha, r_v = self.rates.unbind(1)
        parts = [
            r_k[:, None].expand(-1, self.width),
            r_eta[:, None],
            r_alpha[:, None],
            r_v[:, None].expand(-1, self.width),
        ]
        return torch.cat([*parts, torch.ones_like(parts[0])], dim=1)


def advance(layer: Layer, drive: Drive, t: int, alpha: torch.Tensor, mu: torch.Tensor | None) -> Layer:
    """Token t of a chunk: X [B, H, .., out, in] erased along its input and moved; alpha and mu [B, H]."""
    x, eta = drive.x[:, t], drive.eta[:, t][..., None]

    def wide(gate: torch.Tensor) -> torch.Tensor:
        return gate.view(*gate.shape, *[1] * (layer.live.ndim - 2))

    erased = (layer.live @ x[..., None])[..., 0] * eta
    moved = -(eta * drive.error[:, t])[..., None] * x[..., None, :]
    if layer.step is not None and mu is not None:
        moved = wide(mu) * layer.step + moved
    live = wide(alpha) * layer.live - erased[..., None] * x[..., None, :] + moved
    return Layer(live, None if layer.step is None else moved)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / ||x|| over the last axis."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)
