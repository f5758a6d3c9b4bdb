"""Muon for training: momentum, orthogonalised by Newton-Schulz (NL Eq. 42-44), equal shapes in one batch.

`torch.optim.Muon` does the products in bf16, one matrix at a time: on a CPU without bf16 units that was 80 % of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["Muon", "orthogonalise"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """Matrices [N, R, C] -> about U V^T of each one's singular value decomposition, by five Newton-Schulz steps.

    X <- a X + (b A + c A^2) X with A = X X^T, from X = G / |G|; singular values end between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        square = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov momentum:

    m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m;  W <- W (1 - lr wd) - lr sqrt(max(1, R / C)) NS_5(u).
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay."""
        if closure is not None:
            raise ValueError("Muon.step takes no closure: compute the gradients first")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for params in shapes.values():
                self._step(params, group)

    def _step(self, params: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        updates = []
        for p in params:
            if (grad := p.grad) is None:
                continue
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(buffer, group["momentum"]))
        rows, columns = params[0].shape
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for p, u in zip(params, orthogonalise(torch.stack(updates)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-scale)
