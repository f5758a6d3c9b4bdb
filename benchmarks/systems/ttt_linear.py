"""A TTT-Linear-like model (arXiv 2407.04620): a linear memory per head, taught by gradient steps of mini-batches of 16.

Inner loss 1/2 |LN(W k + b) + k - v|^2; the dual form of the paper reads a mini-batch at once, the primal form decodes.
Plain torch, sessions in one batch, memories in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from benchmarks.systems.base import BLOCKS, DIM, HEADS, VOCAB, Case, tokens

__all__ = ["TTTLinear"]

MINI = 16
HEAD = DIM // HEADS
HIDDEN = 672


class Layer(nn.Module):
    """TTT memory and a gated MLP. State: W [B, H, K, K], b [B, H, 1, K] and their gradients in the mini-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.rate = nn.Linear(DIM, HEADS)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.gate = nn.Linear(DIM, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)
        self.start = nn.Parameter(torch.randn(HEADS, HEAD, HEAD) * 0.02)
        self.scale = nn.Parameter(torch.ones(HEADS, 1, HEAD))
        self.shift = nn.Parameter(torch.zeros(HEADS, 1, HEAD))

    def fresh(self, batch: int) -> list[torch.Tensor]:
        weight = self.start.repeat(batch, 1, 1, 1)
        bias = torch.zeros(batch, HEADS, 1, HEAD)
        return [weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)]

    def forward(self, x: torch.Tensor, state: list[torch.Tensor], place: int) -> torch.Tensor:
        normed = rms_norm(x, (DIM,))
        q, k, v = self.qkv(normed).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        rate = self.rate(normed).sigmoid().transpose(1, 2)[..., None] / HEAD  # [B, H, T, 1]
        read = self._decode if x.shape[1] == 1 else self._chunks
        z = read(q, k, v, rate, state, place)
        x = x + self.out(rms_norm(z.transpose(1, 2).flatten(2), (DIM,)))
        wide, gate = self.gate(rms_norm(x, (DIM,))).chunk(2, dim=-1)
        return x + self.down(silu(gate) * wide)

    def _norm(self, z: torch.Tensor) -> torch.Tensor:
        return self.shift + self.scale * self._standard(z)[0]

    @staticmethod
    def _standard(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        deviation = (z.var(dim=-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return (z - z.mean(dim=-1, keepdim=True)) / deviation, deviation

    def _gradient(self, z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of the inner loss, by W k + b: through the layer norm."""
        unit, deviation = self._standard(z)
        g = (self.shift + self.scale * unit - target) * self.scale
        inner = (g * unit).mean(dim=-1, keepdim=True)
        return (g - g.mean(dim=-1, keepdim=True) - unit * inner) / deviation

    def _chunks(self, q, k, v, rate, state, place):  # type: ignore[no-untyped-def]  # another library's
        weight, bias, *_ = state
        outs = []
        for begin in range(0, q.shape[2], MINI):
            qc, kc, vc, rc = (t[:, :, begin : begin + MINI] for t in (q, k, v, rate))
            g = rc * self._gradient(kc @ weight + bias, vc - kc)
            seen = torch.ones(qc.shape[2], qc.shape[2]).tril()
            z = qc @ weight + bias - ((qc @ kc.transpose(-1, -2) + 1) * seen) @ g
            outs.append(qc + self._norm(z))
            weight = weight - kc.transpose(-1, -2) @ g
            bias = bias - g.sum(dim=2, keepdim=True)
        state[0], state[1] = weight, bias
        return torch.cat(outs, dim=2)

    def _decode(self, q, k, v, rate, state, place):  # type: ignore[no-untyped-def]  # another library's
        weight, bias, d_weight, d_bias = state
        g = rate * self._gradient(k @ weight + bias, v - k)
        d_weight.add_(k.transpose(-1, -2) @ g)
        d_bias.add_(g)
        z = q @ (weight - d_weight) + bias - d_bias
        if (place + 1) % MINI == 0:
            weight.sub_(d_weight)
            bias.sub_(d_bias)
            d_weight.zero_()
            d_bias.zero_()
        return q + self._norm(z)


class TTTLinear:
    """See `System`."""

    name = "ttt-linear-like"

    def __init__(self) -> None:
        self._embed = nn.Parameter(torch.randn(VOCAB, DIM) * 0.02)
        self._layers = nn.ModuleList(Layer() for _ in range(BLOCKS)).eval()
        self.num_parameters = sum(p.numel() for p in (self._embed, *self._layers.parameters()))

    def prepare(self, case: Case) -> Callable[[], None]:
        """See `System`. One mini-batch is context enough: the state has a fixed size."""
        if not case.context:
            prompt = tokens(1, case.num_tokens)
            return lambda: self._read(prompt, [layer.fresh(1) for layer in self._layers], 0).argmax(-1)
        states = [layer.fresh(case.sessions) for layer in self._layers]
        last = self._read(tokens(case.sessions, MINI), states, 0).argmax(-1, keepdim=True)
        place = MINI

        def decode() -> None:
            nonlocal last, place
            last = self._read(last, states, place).argmax(-1, keepdim=True)
            place += 1

        return decode

    def _read(self, ids: torch.Tensor, states: list[list[torch.Tensor]], place: int) -> torch.Tensor:
        x = self._embed[ids]
        for layer, state in zip(self._layers, states, strict=True):
            x = layer(x, state, place)
        return rms_norm(x[:, -1], (DIM,)) @ self._embed.T
