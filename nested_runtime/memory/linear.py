"""Linear memories with fixed projections: what Titans and Gated DeltaNet share. A rule says what its gates mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nested_runtime.kernels.linear_memory.scan import linear_scan
from nested_runtime.kernels.short_conv.differentiable import short_conv
from nested_runtime.memory.base import State
from nested_runtime.memory.streams import GatedStreams, unit
from nested_runtime.state.spec import TensorSpec

__all__ = ["Gates", "LinearMemory"]

RUN = 64  # tokens of one run of the quadratic form; any cut gives the same memory


class Gates(NamedTuple):
    """What is written of v, what is erased, log alpha and log mu of every token [.., H]; log_mu None = no momentum."""

    write: torch.Tensor
    erase: torch.Tensor
    log_alpha: torch.Tensor
    log_mu: torch.Tensor | None


class LinearMemory(GatedStreams):
    """H memories X [K, K] (and momenta S): keys x^k and queries x^q are normalised, values are x^v."""

    has_momentum: bool

    def __init__(
        self, dim: int, heads: int, head_dim: int, gates: Sequence[tuple[float, float]], conv_width: int = 4
    ) -> None:
        super().__init__(dim, heads, head_dim, conv_width, gates)

    @abstractmethod
    def gates(self, logits: torch.Tensor) -> Gates:
        """logits [.., G, H] -> the gates [.., H]."""

    def state(self) -> tuple[TensorSpec, ...]:
        """The memory, its momentum, and the convolution window."""
        square = (self.heads, self.head_dim, self.head_dim)
        momentum = (TensorSpec("momentum", square),) if self.has_momentum else ()
        window = TensorSpec("window", (self.conv_width - 1, 3 * self.heads * self.head_dim))
        return (TensorSpec("memory", square), *momentum, window)

    def memory(self, state: State) -> dict[str, torch.Tensor]:
        """X after the last token, without its momentum and the convolution's window."""
        return {"memory": state["memory"]}

    def scan(self, x: torch.Tensor, state: State, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `UpdateRule.scan`."""
        streams, gate, logits = self.project(x)
        mixed, window = short_conv(streams, state["window"], self.conv)
        memory = state["memory"].flatten(0, 1)
        momentum = state["momentum"].flatten(0, 1) if self.has_momentum else None
        dtype, shape = memory.dtype, (*x.shape[:2], 3, self.heads, self.head_dim)
        q, k, v = (_by_head(t) for t in mixed.to(dtype).view(shape).unbind(2))
        g = Gates(*(None if t is None else _by_head(t) for t in self.gates(logits.to(dtype))))  # type: ignore[arg-type]
        q, k, write = unit(q), unit(k), g.write[..., None] * v
        outs = []
        with torch.autocast(x.device.type, enabled=False):  # memories stay in their own precision
            for at in range(0, x.shape[1], RUN):
                cut = slice(at, at + RUN)
                log_mu = g.log_mu[:, cut] if g.log_mu is not None else None
                out, memory, momentum = linear_scan(
                    q[:, cut], k[:, cut], write[:, cut], g.erase[:, cut], g.log_alpha[:, cut], log_mu, memory, momentum
                )
                outs.append(out)
        read = torch.cat(outs, dim=1).view(x.shape[0], self.heads, x.shape[1], self.head_dim).transpose(1, 2)
        new = {"memory": memory, **({} if momentum is None else {"momentum": momentum})}
        return self.finish(read, gate), {"window": window, **{n: t.view_as(state[n]) for n, t in new.items()}}


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H, ..] -> [B H, T, ..]."""
    return x.transpose(1, 2).flatten(0, 1)
