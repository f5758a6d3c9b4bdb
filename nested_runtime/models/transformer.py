"""The no-memory control: a decoder of HOPE's size and parts that sees a sliding window of tokens and nothing before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nested_runtime.memory.attention import SlidingAttention
from nested_runtime.models.blocks import BlockModel
from nested_runtime.models.config import from_fields
from nested_runtime.models.level_fields import LevelFields, config_of

__all__ = ["Transformer", "TransformerConfig"]


@dataclass(frozen=True)
class TransformerConfig(LevelFields):
    """Shape of the control. `mlp_ratio`: MLP width in units of `dim`; `window`: tokens seen, the present one too."""

    vocab_size: int
    dim: int
    blocks: int
    heads: int
    head_dim: int = 64
    mlp_ratio: int = 4
    window: int = 512
    max_context: int = 1 << 20


class Transformer(BlockModel):
    """Llama-style decoder (RMS norm, rotary, sliding-window attention) with HOPE's MLP and tied embeddings."""

    TINY: ClassVar[dict[str, Any]] = {
        "vocab_size": 64, "dim": 16, "blocks": 2, "heads": 2, "head_dim": 8, "mlp_ratio": 2, "window": 5,
    }  # fmt: skip

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            config.vocab_size, config.dim, config.blocks, config.mlp_ratio, 1,
            lambda: SlidingAttention(config.dim, config.heads, config.head_dim, config.window), config,
        )  # fmt: skip
        self.config = config

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> Transformer:
        """Build from a config.json mapping; ConfigError names an unknown, missing or impossible field."""
        return cls(from_fields(TransformerConfig, fields))

    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads."""
        return config_of(self.config)
