"""Consolidation: a session's recent tokens are read again, and its slower levels learn them (NL section 1: the transfer
of what a fast level holds into a slower one).

The tokens the session still holds are read from a fresh fast memory, with the levels as they are, in pieces of C_1. So
the gradient asks of the levels what the fast memory knew. After the last piece every slower level takes one step along

    g = C_l / N * sum of the gradients of the N - 1 next-token losses

which is the size of its usual step; then the deltas of the faster levels are multiplied by 1 - decay. Fast memory,
clocks and the unfinished chunk stay as they are. Slower levels are all but the first, or the first if it is alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nested_runtime.errors import ConfigError, StateError, UpdateDiverged
from nested_runtime.memory.cms import level_name
from nested_runtime.models.adaptation import retained
from nested_runtime.models.leveled import LeveledModel

__all__ = ["Consolidation", "Replay"]

Tensors = Mapping[str, torch.Tensor]
MAX_PASSES = 64


@dataclass(frozen=True)
class Consolidation:
    """What is asked for.

    passes  times the tokens are read, each with a step at its end
    decay   what the faster levels lose of their deltas, 0 to 1
    """

    passes: int = 1
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= MAX_PASSES:
            raise ConfigError(f"passes must be in 1..{MAX_PASSES}, got {self.passes}")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be in 0..1, got {self.decay}")


class Replay:
    """One consolidation, in steps that are short: `advance` until `is_over`, then take `result`.

    state   of one session, without a batch axis; it is not written to
    tokens  how many are read; with fewer than 2 there is nothing to learn and `is_over` at once
    """

    def __init__(self, model: LeveledModel, state: Tensors, wanted: Consolidation) -> None:
        if model.adaptation is None:
            raise StateError("this model has no levels to consolidate")
        device = model.embed.device
        self.model, self.wanted, self.adaptation = model, wanted, model.adaptation
        self.tokens = retained(state).to(device)
        self.into = tuple(range(len(model.levels)))[1:] or (0,)
        self._state = {name: t.to(device)[None] for name, t in state.items()}
        self._left = wanted.passes if len(self.tokens) > 1 else 0
        self._done, self._reading = 0, self._fresh()
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether all passes are done."""
        return self._left == 0

    @property
    def into_names(self) -> list[str]:
        """The levels that learn."""
        return [level_name(number) for number in self.into]

    def advance(self) -> None:
        """Read the next piece; at the end of a pass, step. UpdateDiverged: the step is not finite."""
        end = min(self._done + self.model.update_chunk, len(self.tokens) - 1)
        tokens = self.tokens[None, self._done : end]
        found, self._reading = self.model.read_again(tokens, self.tokens[end, None], self._reading, self._done)
        self._sums = {name: self._sums[name] + t if self._sums else t for name, t in found.items()}
        self._done = end
        if end == len(self.tokens) - 1:
            self._step()
            self._left -= 1
            self._done, self._reading, self._sums = 0, self._fresh(), {}

    def result(self) -> dict[str, torch.Tensor]:
        """The state after the consolidation, on the CPU."""
        faster = range(self.into[0])
        state = self.adaptation.decay(self._state, faster, 1.0 - self.wanted.decay)
        return {name: tensor[0].detach().cpu() for name, tensor in state.items()}

    def _fresh(self) -> dict[str, torch.Tensor]:
        """The state before the first token: fresh but for what levels own."""
        fresh = self.model.fresh(self.tokens[None])
        levels = {spec.name for spec in self.model.state_spec() if spec.level.startswith("cms.")}
        return {name: self._state[name] if name in levels else t for name, t in fresh.items()}

    def _step(self) -> None:
        own = {name: self._state[name] for name in self.adaptation.names()}
        for number in self.into:
            scale = self.model.levels[number].chunk / len(self.tokens)
            scaled = {name: t * scale for name, t in self._sums.items()}
            stepped = self.adaptation.consolidate(own, scaled, [number])
            if not bool(stepped.good.all()):
                raise UpdateDiverged(
                    f"the step of {level_name(number)} is not finite; nothing was changed: reset that level"
                )
            own = stepped.tensors
        self._state |= own
