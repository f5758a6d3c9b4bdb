"""Adam as an element-wise associative memory (NL App. B).

The first moment is the discounted L2 regression of the gradient, the second that of its square:

    m_t = argmin_m sum_i b1^(t-i) (m - g_i)^2,    v_t = argmin_v sum_i b2^(t-i) (v - g_i^2)^2
    W <- W - lr m_t / (sqrt(v_t) + eps)

Both minimisers are the bias-corrected exponential averages, so this is Adam (arXiv 1412.6980) exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nested_runtime.optim.base import InnerRule, RuleState, check_range, per_session

__all__ = ["Adam"]

SQRT_MIN = 1e-36  # keeps the square root's derivative finite where every gradient was zero


@dataclass(frozen=True)
class Adam(InnerRule):
    """`beta1`, `beta2` discounts of the two regressions, `eps` added to the root."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_range(self, beta1=(0.0, 1.0), beta2=(0.0, 1.0), eps=(1e-12, 1.0))

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`first`, `second`: the averages, not yet corrected; `count`: steps taken."""
        return {"first": shape, "second": shape, "count": ()}

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        grad = grad.to(state["first"].dtype)
        count = state["count"] + 1
        first = self.beta1 * state["first"] + (1 - self.beta1) * grad
        second = self.beta2 * state["second"] + (1 - self.beta2) * grad.square()
        m = first / per_session(1 - self.beta1**count, grad)
        v = second / per_session(1 - self.beta2**count, grad)
        new = param - per_session(lr, param) * m / (v.clamp(min=SQRT_MIN).sqrt() + self.eps)
        return new.to(param.dtype), {"first": first, "second": second, "count": count}
