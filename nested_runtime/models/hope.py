"""HOPE: self-modifying Titans followed by a continuum memory system in every block (NL section 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.deep import DeepSelfModifying
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.memory.varied import VariedSelfModifying
from nested_runtime.models.blocks import BlockModel
from nested_runtime.models.config import from_fields
from nested_runtime.models.level_fields import LevelFields, config_of

__all__ = ["Hope", "HopeConfig"]


@dataclass(frozen=True)
class HopeConfig(LevelFields):
    """Shape of a HOPE model.

    mlp_ratio      width of the static level of every block in units of `dim`
    memory_hidden  the fast memories are MLPs of this width; None = matrices
    momentum       they step with momentum
    changes        of the rule, as `memory/varied.py` names them (for ablations)
    The last three have no compiled kernel.
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
    memory_hidden: int | None = None
    momentum: bool = False
    changes: list[Any] = field(default_factory=list)
    max_context: int = 1 << 20


def rule_of(config: HopeConfig, options: RuleOptions) -> Callable[[], UpdateRule]:
    """Makes the rule whose kernels are fast, unless a field asks for another."""
    shape = (config.dim, config.heads, config.head_dim, options, config.conv_width)
    is_deep = config.memory_hidden is not None or config.momentum
    if is_deep and config.changes:
        raise ConfigError("config field 'changes' cannot be had with 'memory_hidden' or 'momentum': leave one out")
    if is_deep:
        return lambda: DeepSelfModifying(*shape, hidden=config.memory_hidden, momentum=config.momentum)
    return lambda: VariedSelfModifying(*shape, config.changes) if config.changes else SelfModifying(*shape)


class Hope(BlockModel):
    """HOPE language model with tied embeddings."""

    TINY: ClassVar[dict[str, Any]] = {
        "vocab_size": 64, "dim": 16, "blocks": 2, "heads": 2, "head_dim": 8, "chunk": 4, "mlp_ratio": 2,
    }  # fmt: skip

    def __init__(self, config: HopeConfig) -> None:
        options = RuleOptions(config.chunk, config.read, config.retain)
        rule = rule_of(config, options)
        super().__init__(config.vocab_size, config.dim, config.blocks, config.mlp_ratio, config.chunk, rule, config)
        self.config, self.period, self.is_capturable = config, config.chunk, not config.levels

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> Hope:
        """Build from a config.json mapping; ConfigError names an unknown, missing or impossible field."""
        return cls(from_fields(HopeConfig, fields))

    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads; without the options of the rule that are not used."""
        unused: dict[str, Any] = {"memory_hidden": None, "momentum": False, "changes": []}
        return {name: v for name, v in config_of(self.config).items() if name not in unused or v != unused[name]}
