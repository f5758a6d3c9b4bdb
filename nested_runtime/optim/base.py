"""InnerRule: how a tensor takes one step along a gradient, as a pure function with fixed-shape state.

The same rule serves twice: a CMS level steps the weights of many sessions at once (the leading axis S), and
`DeepOptimizer` steps a model's parameters (S = 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch

from nested_runtime.errors import ConfigError
from nested_runtime.registry import OPTIMIZERS

__all__ = ["InnerRule", "RuleState", "build_rule", "check_counts", "check_range", "per_session"]

RuleState = Mapping[str, torch.Tensor]
"""State tensors of a rule by its own names, each [S, *state_shapes(shape)[name]]."""


class InnerRule(ABC):
    """One optimizer. Subclasses are frozen dataclasses whose fields are its options.

    All zeros is the state of a parameter that has taken no step. `step` is pure (nothing is changed in place), made of
    torch operations only, and treats every session s by itself: row s of the result depends on row s of the arguments.
    """

    needs_inputs: ClassVar[bool] = False  # step() wants `inputs` for matrices and falls back to GD without

    @abstractmethod
    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of one session's state for a parameter of `shape` (no session axis); empty for a stateless rule."""

    def init(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fresh (zero) state for `param` [S, *shape], in float32 or wider, on its device."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        shapes = self.state_shapes(tuple(param.shape[1:]))
        return {n: torch.zeros(len(param), *s, dtype=dtype, device=param.device) for n, s in shapes.items()}

    @abstractmethod
    def step(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        state: RuleState,
        lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One step: param and grad [S, *shape], lr a number or [S] -> the new param [S, *shape] and state.

        grad    gradient of the summed loss over the N tokens of the step
        inputs  [S, N, fan_in]: what a matrix [fan_out, fan_in] was multiplied with, for rules with `needs_inputs`;
                rows of zeros are tokens that do not count
        """


def per_session(value: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """A number, or [S] reshaped to multiply `like` [S, ...]."""
    return value.view(-1, *[1] * (like.ndim - 1)) if isinstance(value, torch.Tensor) else value


def check_range(rule: InnerRule, **bounds: tuple[float, float]) -> None:
    """ConfigError unless every named field is a number with low <= value < high."""
    for name, (low, high) in bounds.items():
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
            limit = f"below {high}" if high < math.inf else "finite"
            raise ConfigError(f"optimizer option {name!r} must be at least {low} and {limit}, got {value!r}")


def check_counts(rule: InnerRule, *names: str) -> None:
    """ConfigError unless every named field is a whole number of at least 1."""
    for name in names:
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"optimizer option {name!r} must be a whole number of at least 1, got {value!r}")


def build_rule(name: str, options: Mapping[str, Any] | None = None) -> InnerRule:
    """The rule registered as `name`; ConfigError names an unknown rule, an unknown option or an impossible value."""
    kind = OPTIMIZERS.get(name)
    known = [f.name for f in fields(kind)]
    for option in options or {}:
        if option not in known:
            raise ConfigError(f"unknown option {option!r} of optimizer {name!r}; known: {', '.join(known) or 'none'}")
    rule: InnerRule = kind(**(options or {}))
    return rule
