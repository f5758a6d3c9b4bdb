"""M3, multi-scale momentum Muon (NL Alg. 1): a continuum memory of gradients with two frequencies.

    every step     m1 <- b1-average of g,   v <- b2-average of g^2,   O1 = NS(m1)
    every f steps  m2 <- b3-average of the last f gradients' sum,     O2 = NS(m2)
    W <- W - lr (O1 + a O2) / sqrt(v + eps)

mode="paper" is Alg. 1 to the letter: "average" is x <- x + b y, nothing decays. Newton-Schulz then cancels b1 and b3,
and v only grows. mode="ema" (default) reads them as x <- b x + (1 - b) y with v corrected for its start, and scales the
step to root mean square `rms`, so that lr means the same for every shape and time. The slow memory learns the gradients
of window k when k ends, so the first f steps have O2 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nested_runtime.errors import ConfigError
from nested_runtime.optim.adam import Adam
from nested_runtime.optim.base import InnerRule, RuleState, check_counts, check_range, per_session
from nested_runtime.optim.matrices import as_matrix, is_matrix, newton_schulz

__all__ = ["M3"]

ROOT_EPS = 1e-30  # under the root of the step's mean square


@dataclass(frozen=True)
class M3(InnerRule):
    """`beta1` fast, `beta2` second moment, `beta3` slow, `slow` a, `every` f, `steps` of Newton-Schulz.

    Vectors and scalars take Adam at `vector_rate` times the learning rate.
    """

    mode: str = "ema"
    beta1: float = 0.95
    beta2: float = 0.98
    beta3: float = 0.9
    slow: float = 0.5
    every: int = 8
    steps: int = 5
    eps: float = 1e-8
    rms: float = 0.2
    vector_rate: float = 0.15
    vectors: Adam = field(default=Adam(0.9, 0.98), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("ema", "paper"):
            raise ConfigError(f'optimizer option \'mode\' must be "ema" or "paper", got {self.mode!r}')
        top = 1.0 if self.mode == "ema" else 1e6
        check_range(self, beta1=(0.0, top), beta2=(0.0, top), beta3=(0.0, top))
        check_range(self, slow=(0.0, 1e6), eps=(1e-30, 1.0), rms=(0.0, 1e6), vector_rate=(0.0, 1e6))
        check_counts(self, "every", "steps")

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`fast` m1, `second` v, `window` sum of this window's gradients, `slow` m2, `direction` O2, `count`."""
        if not is_matrix(shape):
            return self.vectors.state_shapes(shape)
        return dict.fromkeys(("fast", "second", "window", "slow", "direction"), shape) | {"count": ()}

    def step(
        self, param: torch.Tensor, grad: torch.Tensor, state: RuleState, lr: float | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """See `InnerRule.step`."""
        if not is_matrix(param.shape[1:]):
            return self.vectors.step(param, grad, state, lr * self.vector_rate)
        grad = grad.to(state["fast"].dtype)
        count = state["count"] + 1
        fast = self._average(state["fast"], grad, self.beta1)
        second = self._average(state["second"], grad.square(), self.beta2)
        orthogonal = newton_schulz(as_matrix(fast), self.steps).view(grad.shape)
        step = self._scale(orthogonal + self.slow * state["direction"], second, count)
        new = param - per_session(lr, param) * step
        after = {"fast": fast, "second": second, "count": count}
        return new.to(param.dtype), after | self._slow_memory(state, state["window"] + grad, count)

    def _average(self, old: torch.Tensor, new: torch.Tensor, beta: float) -> torch.Tensor:
        return old + beta * new if self.mode == "paper" else beta * old + (1 - beta) * new

    def _scale(self, direction: torch.Tensor, second: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if self.mode == "paper":
            return direction / (second + self.eps).sqrt()
        step = direction / (second / per_session(1 - self.beta2**count, second) + self.eps).sqrt()
        mean_square = step.square().mean(tuple(range(1, step.ndim)), keepdim=True)
        return self.rms * step / (mean_square + ROOT_EPS).sqrt()

    def _slow_memory(self, state: RuleState, window: torch.Tensor, count: torch.Tensor) -> dict[str, torch.Tensor]:
        """The slow level's state after this step: it learns where a session's window of f steps is full."""
        due = count % self.every == 0
        if not due.any():
            return {"window": window, "slow": state["slow"], "direction": state["direction"]}
        learn = due.view(-1, *[1] * (window.ndim - 1))
        slow = torch.where(learn, self._average(state["slow"], window, self.beta3), state["slow"])
        orthogonal = newton_schulz(as_matrix(slow), self.steps).view(window.shape)
        direction = torch.where(learn, orthogonal, state["direction"])
        return {"window": window.masked_fill(learn, 0.0), "slow": slow, "direction": direction}
