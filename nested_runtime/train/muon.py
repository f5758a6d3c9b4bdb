"""Muon for training: momentum, orthogonalised by Newton-Schulz (NL Eq. 42-44), equal shapes in one batch.

`torch.optim.Muon` does the products in bf16, one matrix at a time: on a CPU without bf16 units that was 80 % of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nested_runtime.optim.matrices import newton_schulz, shape_scale

__all__ = ["Muon"]


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
        stacked = torch.stack(updates)
        scale = group["lr"] * shape_scale(stacked)
        for p, u in zip(params, newton_schulz(stacked), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-scale)
