"""One adaptive level: weights that are a learned start plus a delta that belongs to the session.

The delta is dense, or of rank r: delta_W = U (V_0 + V), where V_0 is learned, U and V start at zero. All zeros is the
fresh session in both forms. What it is added to is an MLP of the level's own, whose start W_down,0 = 0 adds nothing
until a step is taken (`AdaptiveMLP`), or the static MLP (`Deltas` alone, ad-hoc level stacking, NL 7.3):

    y = W_down sigma(W_up z),  sigma = relu squared,  W = W_0 + delta
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, relu

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.dispatch import function
from nested_runtime.optim.base import InnerRule, build_rule

__all__ = ["AdaptiveMLP", "Change", "Deltas", "Level", "Span", "check_levels", "keep", "packed_change"]

Change = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(matrix "up" or "down", its input x, x W_0^T) -> x W^T with the sessions' deltas."""

Span = tuple[int, int, int]
"""Slot, first and past-the-last row of one session in a packed step."""


@dataclass(frozen=True)
class Level:
    """One level of a chain (NL Eq. 71).

    chunk      C_l: session tokens between two steps
    hidden     width of the level's own MLP; None where the level changes the static one (variant "stacked")
    rank       r of the session's delta; None = dense
    optimizer  name in the registry of optimizers, `options` its options
    rate       step size; with `learn_rate` its start, learned by the outer loss
    max_step   bound on the norm of one step, over the level's tensors in one block
    max_norm   bound on the norm of the delta
    """

    chunk: int
    hidden: int | None = None
    rank: int | None = None
    optimizer: str = "gd"
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.01
    learn_rate: bool = True
    max_step: float = 1.0
    max_norm: float = 10.0

    def __post_init__(self) -> None:
        for name in ("chunk", "hidden", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.rate < math.inf:
            raise ConfigError(f"rate must be a finite number, 0 or more, got {self.rate}")
        for name in ("max_step", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        self.rule()

    def rule(self) -> InnerRule:
        """The inner optimizer; ConfigError names an unknown one or an impossible option."""
        return build_rule(self.optimizer, self.options)


def check_levels(levels: tuple[Level, ...], chunk: int) -> None:
    """ConfigError unless C divides C_1 (`chunk` C of the fast memory) and C_l divides C_{l+1}."""
    before, of = chunk, "the model's chunk"
    for number, level in enumerate(levels):
        if level.chunk % before:
            raise ConfigError(
                f"levels.{number}.chunk is {level.chunk}: {of}, {before}, does not divide it; give a multiple"
            )
        if level.rule().needs_inputs and (level.chunk != levels[0].chunk or level.rank is not None):
            raise ConfigError(
                f"levels.{number}.optimizer {level.optimizer!r} needs the inputs of one chunk and dense deltas: use it "
                "on levels with the first level's chunk and without rank"
            )
        before, of = level.chunk, f"levels.{number}.chunk"


def keep(_which: str, _x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The change of a session that has taken no step."""
    return y


class Deltas(nn.Module):
    """What a session adds to the matrices `up` and `down` of shapes [out, in].

    Parameters: with rank r, V_0 of each matrix: `up_in` [r, in], `down_in` [r, in]; none where the delta is dense.
    """

    def __init__(self, up: tuple[int, int], down: tuple[int, int], rank: int | None) -> None:
        super().__init__()
        self.rank, self._shapes = rank, {"up": up, "down": down}
        if rank is not None:
            self.up_in = nn.Parameter(torch.randn(rank, up[1]) * up[1] ** -0.5)
            self.down_in = nn.Parameter(torch.randn(rank, down[1]) * down[1] ** -0.5)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a session's delta by name."""
        if self.rank is None:
            return dict(self._shapes)
        factors: dict[str, tuple[int, ...]] = {}
        for which, (rows, columns) in self._shapes.items():
            factors |= {f"{which}_in": (self.rank, columns), f"{which}_out": (rows, self.rank)}
        return factors

    def start(self, name: str) -> torch.Tensor | float:
        """What the delta `name` is added to, as far as the optimizer knows: V_0, and 0 for all else."""
        learned: torch.Tensor | float = getattr(self, name, 0.0)
        return learned.detach() if isinstance(learned, torch.Tensor) else learned

    def delta_of(self, which: str, x: torch.Tensor, delta: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """x delta_W^T for x [.., n, in] and deltas [.., out, in] (or their factors), in x's dtype."""
        if self.rank is None:
            wide = delta[which]
            return (x.to(wide.dtype) @ wide.transpose(-1, -2)).to(x.dtype)
        inner, outer = delta[f"{which}_in"], delta[f"{which}_out"]
        v: torch.Tensor = getattr(self, f"{which}_in").to(inner.dtype) + inner
        return (x.to(v.dtype) @ v.transpose(-1, -2) @ outer.transpose(-1, -2)).to(x.dtype)


def packed_change(start: Deltas, pool: Mapping[str, torch.Tensor], spans: Sequence[Span]) -> Change:
    """The change of packed streams [T, D], in place: `spans`, in order, have the deltas in their slots of `pool`."""
    if start.rank is not None and spans and not torch.is_grad_enabled():
        tensor = pool["up_in"]
        fast = function("low_rank_apply", tensor.device.type, tensor.dtype)
        if fast is not None:
            return _grouped(fast, start, pool, spans)

    def change(which: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for slot, begin, end in spans:
            y[begin:end] += start.delta_of(which, x[begin:end], {name: t[slot] for name, t in pool.items()})
        return y

    return change


def _grouped(
    apply: Callable[..., None], start: Deltas, pool: Mapping[str, torch.Tensor], spans: Sequence[Span]
) -> Change:
    """`packed_change` by one call of `apply` (`kernels/levels`) for all sessions."""
    slots, bounds = list[int](), [0]
    for slot, begin, end in spans:  # rows between two spans go to slot 0, which adds nothing
        slots += [0, slot]
        bounds += [begin, end]
    where = [torch.tensor(n, dtype=torch.int32, device=pool["up_in"].device) for n in (slots, bounds)]

    def change(which: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y.contiguous()
        inner, outer = f"{which}_in", f"{which}_out"
        apply(x.contiguous(), y, getattr(start, inner), pool[inner], pool[outer], *where)
        return y

    return change


class AdaptiveMLP(Deltas):
    """A level's own MLP. Parameters beside those of `Deltas`: the start `up` [H, D], `down` [D, H]."""

    def __init__(self, dim: int, hidden: int, rank: int | None) -> None:
        super().__init__((hidden, dim), (dim, hidden), rank)
        self.up = nn.Parameter(torch.randn(hidden, dim) * dim**-0.5)
        self.down = nn.Parameter(torch.zeros(dim, hidden))

    def forward(self, z: torch.Tensor, change: Change = keep) -> torch.Tensor:
        """z [.., D] -> [.., D]."""
        hidden = relu(change("up", z, linear(z, self.up))).square()
        return change("down", hidden, linear(hidden, self.down))
