"""The controls with linear memories: HOPE's blocks around Titans or Gated DeltaNet, as families of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from nested_runtime.memory.gated_delta import GatedDelta
from nested_runtime.memory.linear import LinearMemory
from nested_runtime.memory.titans import Titans
from nested_runtime.models.blocks import BlockModel
from nested_runtime.models.config import from_fields
from nested_runtime.models.level_fields import LevelFields, config_of

__all__ = ["DeltaModel", "LinearConfig", "LinearModel", "TitansModel"]


@dataclass(frozen=True)
class LinearConfig(LevelFields):
    """Shape of a control. The fields mean what they mean in `HopeConfig`; there are no chunks."""

    vocab_size: int
    dim: int
    blocks: int
    heads: int
    head_dim: int = 64
    conv_width: int = 4
    mlp_ratio: int = 3
    max_context: int = 1 << 20


class LinearModel(BlockModel):
    """A family whose `RULE` is a linear memory."""

    RULE: ClassVar[type[LinearMemory]]
    TINY: ClassVar[dict[str, Any]] = {
        "vocab_size": 64, "dim": 16, "blocks": 2, "heads": 2, "head_dim": 8, "mlp_ratio": 2,
    }  # fmt: skip

    def __init__(self, config: LinearConfig) -> None:
        rule: Any = self.RULE  # every rule narrows the constructor of `LinearMemory`: its gates are its own
        super().__init__(
            config.vocab_size, config.dim, config.blocks, config.mlp_ratio, 1,
            lambda: rule(config.dim, config.heads, config.head_dim, config.conv_width), config,
        )  # fmt: skip
        self.config, self.period = config, 1

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a config.json mapping; ConfigError names an unknown, missing or impossible field."""
        return cls(from_fields(LinearConfig, fields))

    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads."""
        return config_of(self.config)


class TitansModel(LinearModel):
    """Momentum and decay, nothing modifies itself."""

    RULE = Titans


class DeltaModel(LinearModel):
    """Gated DeltaNet: HOPE with fixed projections."""

    RULE = GatedDelta
