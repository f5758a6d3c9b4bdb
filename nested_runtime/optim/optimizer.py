"""DeepOptimizer: any inner rule as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nested_runtime.errors import ConfigError
from nested_runtime.optim.base import InnerRule, build_rule

__all__ = ["DeepOptimizer", "deep_optimizer"]


class DeepOptimizer(torch.optim.Optimizer):
    """Steps parameters with one inner rule. `lr` may differ per parameter group and follow a schedule.

    Rules with `needs_inputs` (DGD) get the inputs of the last forward pass of every `nn.Linear` of `model`; the loss is
    then taken to be a mean over the N inputs, as torch's losses are, and the inputs are scaled by N^-1/2 to match.
    """

    def __init__(self, params: Any, rule: InnerRule, lr: float, model: nn.Module | None = None) -> None:
        if not lr >= 0:
            raise ConfigError(f"optimizer option 'lr' must be at least 0, got {lr!r}")
        super().__init__(params, {"lr": lr})
        self.rule = rule
        self._inputs: dict[torch.Tensor, torch.Tensor] = {}
        if rule.needs_inputs and model is not None:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            x = args[0].detach().flatten(0, -2)
            weight = module.get_parameter("weight")
            self._inputs[weight] = x / max(1, len(x)) ** 0.5

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p] or self.rule.init(p[None])
                x = self._inputs.get(p)
                new, after = self.rule.step(p[None], p.grad[None], state, group["lr"], None if x is None else x[None])
                p.copy_(new[0])
                self.state[p] = after
        return loss


def deep_optimizer(name: str, params: Any, lr: float, model: nn.Module | None = None, **options: Any) -> DeepOptimizer:
    """The registered rule `name` over `params`; see `DeepOptimizer`."""
    return DeepOptimizer(params, build_rule(name, options), lr, model)
