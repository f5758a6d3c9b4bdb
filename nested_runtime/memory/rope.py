"""Rotary positions (RoPE, arXiv 2104.09864) and the ways to stretch them: linear, llama3, yarn (arXiv 2309.00071).

Every variant here only changes how fast the pairs turn, and yarn their length, so scores depend on distances alone and
keys can be stored rotated at any session position. Variants that look at the length of the text (dynamic, longrope) are
not of this kind and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from nested_runtime.errors import ConfigError

__all__ = ["Rope", "rotate"]

TYPES = ("plain", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How q and k turn. `factor`: how many times longer than `original` tokens the text may be.

    low_freq_factor, high_freq_factor   llama3: pairs that turn less than low times in `original` tokens are slowed by
                                        `factor`, those that turn more than high times are not, the rest in between
    beta_fast, beta_slow                the same for yarn, by the index of the pair
    length                              yarn: factor on cos and sin; None = 0.1 ln(factor) + 1
    """

    type: str = "plain"
    theta: float = 10_000.0
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    length: float | None = None
    truncate: bool = True

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Rope:
        """From a config mapping; ConfigError names an unknown or impossible field."""
        known = [f.name for f in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"unknown config field 'rope.{name}'; known: {', '.join(known)}")
            allowed: tuple[type, ...] = {"type": (str,), "truncate": (bool,)}.get(name, (int, float))
            optional = value is None and name == "length"
            if not optional and (not isinstance(value, allowed) or (isinstance(value, bool) and name != "truncate")):
                raise ConfigError(f"config field 'rope.{name}' must be a {allowed[-1].__name__}, got {value!r}")
        rope = cls(**values)
        rope.check()
        return rope

    def check(self) -> None:
        """Raise ConfigError for values that make no rotation."""
        if self.type not in TYPES:
            raise ConfigError(f"config field 'rope.type' is {self.type!r}; known: {', '.join(TYPES)}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"config field 'rope.{name}' must be a number above 0, got {getattr(self, name)!r}")
        if self.type in ("llama3", "yarn") and self.original < 1:
            raise ConfigError(f"config field 'rope.original' must be at least 1 for {self.type}, got {self.original}")
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError("config field 'rope.low_freq_factor' must be below 'rope.high_freq_factor'")

    def speeds(self, dim: int) -> torch.Tensor:
        """Radians per token of the dim/2 pairs, float64."""
        plain = self.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if self.type == "linear":
            return plain / self.factor
        if self.type == "llama3":
            turns = self.original * plain / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        elif self.type == "yarn":
            kept = self._yarn_kept(dim)
        else:
            return plain
        kept = kept.clamp(0, 1)
        return plain * kept + plain / self.factor * (1 - kept)

    def _yarn_kept(self, dim: int) -> torch.Tensor:
        """How far each pair keeps its plain speed: 1 for the fast ones, 0 for the slow ones, a ramp between."""

        def pair_of(turns: float) -> float:
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
        return 1 - ramp.clamp(0, 1)

    def turns(self, at: torch.Tensor, dim: int) -> torch.Tensor:
        """cos and sin of the angles at positions `at` [..], float64: [.., 2, dim/2], yarn's length included."""
        angle = at[..., None].double() * self.speeds(dim).to(at.device)  # float32 angles are wrong by 0.06 at 10^6
        length = self.length
        if length is None:
            length = 0.1 * math.log(self.factor) + 1 if self.type == "yarn" and self.factor > 1 else 1.0
        return torch.stack([angle.cos(), angle.sin()], dim=-2) * length


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x [.., T, H, K] turned by `turns` [T, 2, K/2]: pairs are (i, i + K/2)."""
    cos, sin = turns.to(x.dtype).unsqueeze(-3).unbind(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
