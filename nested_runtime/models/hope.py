"""HOPE: self-modifying Titans followed by a continuum memory system in every block (NL section 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.memory.varied import VariedSelfModifying
from nested_runtime.models.blocks import BlockModel
from nested_runtime.models.config import from_fields
from nested_runtime.models.level_fields import LevelFields, config_of

__all__ = ["Hope", "HopeConfig"]


@dataclass(frozen=True)
class HopeConfig(LevelFields):
    """Shape of a HOPE model.

    `mlp_ratio` is the width of the static level of every block in units of `dim`; `changes` are those of the rule that
    `memory/varied.py` names (for ablations: they have no compiled kernel).
    """

    vocab_size: int
    dim: int
    blocks: int
    heads: int
    head_dim: int = 64
    chunk: int = 32
    conv_width: int = 4
    mlp_ratio: int = 3
    read: str = "token"
    retain: str = "start"
    changes: list[Any] = field(default_factory=list)
    max_context: int = 1 << 20


class Hope(BlockModel):
    """HOPE language model with tied embeddings."""

    TINY: ClassVar[dict[str, Any]] = {
        "vocab_size": 64, "dim": 16, "blocks": 2, "heads": 2, "head_dim": 8, "chunk": 4, "mlp_ratio": 2,
    }  # fmt: skip

    def __init__(self, config: HopeConfig) -> None:
        options = RuleOptions(config.chunk, config.read, config.retain)
        shape = (config.dim, config.heads, config.head_dim, options, config.conv_width)

        def rule() -> UpdateRule:
            return VariedSelfModifying(*shape, config.changes) if config.changes else SelfModifying(*shape)

        super().__init__(config.vocab_size, config.dim, config.blocks, config.mlp_ratio, config.chunk, rule, config)
        self.config, self.period = config, config.chunk

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> Hope:
        """Build from a config.json mapping; ConfigError names an unknown, missing or impossible field."""
        return cls(from_fields(HopeConfig, fields))

    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads; without `changes` where there are none."""
        values = config_of(self.config)
        return values if self.config.changes else {name: value for name, value in values.items() if name != "changes"}
