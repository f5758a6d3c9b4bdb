"""Continuum memory system of one block (NL Eq. 70-74): a static MLP and, beside it, a chain of adaptive levels.

Levels are ordered fastest first. Level l keeps its weights for C_l session tokens, then takes one step along the
gradient of their summed next-token loss; frequency 0 is the static MLP F, there in every variant. On the input z:

    sequential  y_l = y_{l-1} + MLP_l(y_{l-1}),  y_0 = z;   out = (y_k - z) + F(y_k)                        NL Eq. 73
    nested      the same chain from one common start; when a level steps, every faster one restarts from it   NL Eq. 72
    headwise    out = F(z) + sum_l w_l MLP_l(z), w learned                                                    NL Eq. 74
    stacked     out = F_{W + sum_l delta_l}(z): levels start as the static MLP, that of a pretrained model,   NL 7.3
                and what they have moved since is added to it; F(z) itself never changes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import nn
from torch.nn.functional import linear, relu

from nested_runtime.errors import ConfigError
from nested_runtime.memory.gated_mlp import GatedMLP
from nested_runtime.memory.level import AdaptiveMLP, Change, Deltas, Level, keep
from nested_runtime.state.spec import TensorSpec

__all__ = ["VARIANTS", "ContinuumMemory", "LevelStep", "level_name"]

VARIANTS = ("sequential", "nested", "headwise", "stacked")
Tensors = Mapping[str, torch.Tensor]


def level_name(number: int) -> str:
    """What level `number` (from 0, the fastest) is called in states and by clients."""
    return f"cms.{number + 1}"


@dataclass(frozen=True)
class LevelStep:
    """New tensors of one level of one block for B sessions, the norms [B] of the steps, and which are finite [B]."""

    tensors: dict[str, torch.Tensor]
    norm: torch.Tensor
    finite: torch.Tensor


class ContinuumMemory(nn.Module):
    """The chain of one block: a static MLP and adaptive `levels`, see `VARIANTS`.

    static  F, an MLP of another kind; None = W_down relu(W_up z)^2, `hidden` wide, whose `up` and `down` are here
    """

    def __init__(
        self, dim: int, hidden: int, levels: Sequence[Level] = (), variant: str = "sequential",
        static: GatedMLP | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.variant, self.static = tuple(levels), variant, static
        self._check(dim)
        if static is None:
            self.up = nn.ParameterList([torch.randn(hidden, dim) * dim**-0.5])
            self.down = nn.ParameterList([torch.zeros(dim, hidden)])
        if levels:
            starts = levels[:1] if variant == "nested" else levels
            width = hidden if static is None else 2 * hidden  # of what `up` puts out
            self.levels = nn.ModuleList(
                Deltas((width, dim), (dim, hidden), level.rank)
                if level.hidden is None
                else AdaptiveMLP(dim, level.hidden, level.rank)
                for level in starts
            )
            if any(level.learn_rate for level in levels):
                self.log_rates = nn.Parameter(torch.zeros(len(levels)))
            if variant == "headwise":
                self.heads = nn.Parameter(torch.ones(len(levels)))

    def _check(self, dim: int) -> None:
        levels, variant = self.config, self.variant
        if variant not in VARIANTS:
            raise ConfigError(f"cms must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if variant == "nested" and len({(level.hidden, level.rank) for level in levels}) > 1:
            raise ConfigError("cms is 'nested', so all levels must have the same hidden and rank")
        for number, level in enumerate(levels):
            if (level.hidden is None) != (variant == "stacked"):
                raise ConfigError(
                    f"levels.{number}.hidden is {level.hidden}, and cms {variant!r}: "
                    + ("leave it out, the level has the static MLP's" if level.hidden else "give the MLP's width")
                )
            if level.rank is not None and level.rank > dim:
                raise ConfigError(f"levels.{number}.rank is {level.rank}, more than the stream is wide, {dim}")

    def level(self, number: int) -> Deltas:
        """The start of level `number`."""
        start: Deltas = self.levels[0 if self.variant == "nested" else number]  # type: ignore[assignment]
        return start

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.up[0].dtype if self.static is None else self.static.dtype

    def rate(self, number: int) -> torch.Tensor | float:
        """The step size of level `number`."""
        level = self.config[number]
        return level.rate * self.log_rates[number].exp() if level.learn_rate else level.rate

    def forward(self, z: torch.Tensor, changes: Sequence[Change] | None = None) -> torch.Tensor:
        """z [.., D] -> [.., D]; `changes` adds the sessions' deltas, one per level."""
        if not self.config:
            return self._static(z)
        wanted = changes or [keep] * len(self.config)
        if self.variant == "stacked":
            return self._static(z, lambda which, x, y: reduce(lambda y, change: change(which, x, y), wanted, y))
        pairs = [(self._mlp(number), change) for number, change in enumerate(wanted)]
        if self.variant == "headwise":
            read = torch.stack([mlp(z, change) for mlp, change in pairs], dim=-1)
            return self._static(z) + linear(read, self.heads[None])[..., 0]
        y = z
        for mlp, change in pairs:
            y = y + mlp(y, change)
        return (y - z) + self._static(y)

    def _mlp(self, number: int) -> AdaptiveMLP:
        return cast(AdaptiveMLP, self.level(number))

    def _static(self, z: torch.Tensor, change: Change = keep) -> torch.Tensor:
        if self.static is not None:
            out: torch.Tensor = self.static(z, change)
            return out
        hidden = relu(change("up", z, linear(z, self.up[0]))).square()
        return change("down", hidden, linear(hidden, self.down[0]))

    # ---- what a session owns ----------------------------------------------------------------------------------------

    def state(self) -> tuple[TensorSpec, ...]:
        """Per level: `delta`, the optimizer's state `opt`, and where C_l > C_1 the gradient `sum` so far."""
        return tuple(
            TensorSpec(f"{number + 1}.{name}", shape, level=level_name(number))
            for number, level in enumerate(self.config)
            for name, shape in self._shapes(number, level).items()
        )

    def _shapes(self, number: int, level: Level) -> dict[str, tuple[int, ...]]:
        of_delta, rule = self.level(number).shapes(), level.rule()
        shapes = {f"delta.{name}": shape for name, shape in of_delta.items()}
        if level.chunk > self.config[0].chunk:
            shapes |= {f"sum.{name}": shape for name, shape in of_delta.items()}
        for name, shape in of_delta.items():
            shapes |= {f"opt.{name}.{key}": of for key, of in rule.state_shapes(shape).items()}
        return shapes

    def deltas(self, number: int, state: Tensors) -> dict[str, torch.Tensor]:
        """The delta of level `number` by name, out of this block's tensors."""
        return {name: state[f"{number + 1}.delta.{name}"] for name in self.level(number).shapes()}

    def step(self, number: int, state: Tensors, gradient: Tensors, inputs: Tensors | None = None) -> LevelStep:
        """One step of level `number` along `gradient` (by delta name, [B, ..]), bounded in norm. Nothing is written."""
        level, mlp = self.config[number], self.level(number)
        rule, rate = level.rule(), self.rate(number)
        old, moves = self.deltas(number, state), {}
        new: dict[str, torch.Tensor] = {}
        for name, delta in old.items():
            weight = (delta + mlp.start(name)).detach()
            prefix = f"{number + 1}.opt.{name}."
            own = {key: state[prefix + key] for key in rule.state_shapes(tuple(delta.shape[1:]))}
            keys = inputs.get(name) if inputs is not None else None
            after, own = rule.step(weight, gradient[name], own, rate, keys)
            moves[name] = after - weight
            new |= {prefix + key: tensor for key, tensor in own.items()}
        norm = total_norm(moves)
        moves = scaled(moves, (level.max_step / norm).clamp(max=1.0))
        moved = {name: delta + moves[name] for name, delta in old.items()}
        moved = scaled(moved, (level.max_norm / total_norm(moved)).clamp(max=1.0))
        new |= {f"{number + 1}.delta.{name}": tensor for name, tensor in moved.items()}
        finite = torch.stack([tensor.reshape(tensor.shape[0], -1).isfinite().all(1) for tensor in new.values()]).all(0)
        return LevelStep(new, norm.detach().clamp(max=level.max_step), finite)


def total_norm(tensors: Tensors) -> torch.Tensor:
    """The norm over all tensors of each session, [B]; a hair above zero, where a root has a slope."""
    return (torch.stack([tensor.flatten(1).square().sum(1) for tensor in tensors.values()]).sum(0) + 1e-30).sqrt()


def scaled(tensors: Tensors, factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each session's tensors [B, ..] times its factor [B]."""
    return {name: tensor * factor.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in tensors.items()}
