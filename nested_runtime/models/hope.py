"""HOPE: self-modifying Titans followed by a continuum memory system in every block (NL section 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.memory.cms import ContinuumMemory, Level
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.models.base import LanguageModel, Pool
from nested_runtime.models.config import from_fields
from nested_runtime.state.spec import TensorSpec, prefixed

__all__ = ["Hope", "HopeConfig"]

NORM_EPS = 1e-6


@dataclass(frozen=True)
class HopeConfig:
    """Shape of a HOPE model. `mlp_ratio` is the width of the static level of every block in units of `dim`."""

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
    max_context: int = 1 << 20


class _Block(nn.Module):
    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        options = RuleOptions(config.chunk, config.read, config.retain)
        self.memory = SelfModifying(config.dim, config.heads, config.head_dim, options, config.conv_width)
        self.cms = ContinuumMemory(config.dim, [Level("static", config.mlp_ratio * config.dim)])
        self.norm_memory = nn.Parameter(torch.ones(config.dim))
        self.norm_cms = nn.Parameter(torch.ones(config.dim))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.cms(_norm(x, self.norm_cms))


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps=NORM_EPS)


class Hope(LanguageModel):
    """HOPE language model with tied embeddings."""

    TINY: ClassVar[dict[str, Any]] = {
        "vocab_size": 64, "dim": 16, "blocks": 2, "heads": 2, "head_dim": 8, "chunk": 4, "mlp_ratio": 2,
    }  # fmt: skip

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.chunk = config.vocab_size, config.chunk
        self.embed = nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm = nn.Parameter(torch.ones(config.dim))

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> Hope:
        """Build from a config.json mapping; ConfigError names an unknown, missing or impossible field."""
        return cls(from_fields(HopeConfig, fields))

    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads."""
        return asdict(self.config)

    def state_spec(self) -> tuple[TensorSpec, ...]:
        """See `LanguageModel.state_spec`."""
        specs = [prefixed(f"blocks.{i}.memory", block.memory.state()) for i, block in enumerate(self.blocks)]
        return tuple(spec for group in specs for spec in group)

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """See `LanguageModel.forward`."""
        x = embedding(batch.token_ids, self.embed)
        for i, block in enumerate(self.blocks):
            local = {s.name: pool[f"blocks.{i}.memory.{s.name}"] for s in block.memory.state()}
            x = x + block.memory.apply_packed(_norm(x, block.norm_memory), local, batch)
            x = block.mix(x)
        return _norm(x, self.norm)

    def scan(
        self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor] | None, position: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `LanguageModel.scan`."""
        x = embedding(tokens, self.embed)
        start = state if state is not None else self._fresh(tokens)
        new: dict[str, torch.Tensor] = {}
        for i, block in enumerate(self.blocks):
            prefix = f"blocks.{i}.memory."
            local = {s.name: start[prefix + s.name] for s in block.memory.state()}
            out, after = block.memory.scan(_norm(x, block.norm_memory), local, position)
            new.update({prefix + name: tensor for name, tensor in after.items()})
            x = block.mix(x + out)
        return _norm(x, self.norm), new

    def _fresh(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype, device = self.blocks[0].memory.base.dtype, tokens.device
        shapes = {s.name: (tokens.shape[0], *s.shape) for s in self.state_spec()}
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel.logits`."""
        return linear(hidden, self.embed).float() if hidden.dtype != torch.float64 else linear(hidden, self.embed)
