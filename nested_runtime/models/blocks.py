"""Blocks of an update rule followed by a continuum memory, with tied embeddings: HOPE and the transformer control.

Each block: x <- x + rule(norm(x)), then x <- x + cms(norm(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.cms import ContinuumMemory
from nested_runtime.memory.level import Change, Level
from nested_runtime.models.base import Pool
from nested_runtime.models.fused import Fused, is_served, pack_output, pack_stack
from nested_runtime.models.level_fields import LevelFields, read_levels
from nested_runtime.models.leveled import LeveledBlock, LeveledModel, Place, Tensors
from nested_runtime.state.spec import TensorSpec

if TYPE_CHECKING:
    from nested_runtime.kernels.native.stack import Linear, Stack

__all__ = ["Block", "BlockModel"]

NORM_EPS = 1e-6


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps=NORM_EPS)


class Block(LeveledBlock):
    """One update rule and a continuum memory whose static MLP is `mlp_ratio` times as wide as the stream."""

    def __init__(
        self, rule: UpdateRule, dim: int, mlp_ratio: int, levels: Sequence[Level] = (), variant: str = "sequential"
    ) -> None:
        super().__init__()
        self.memory = rule
        self.cms = ContinuumMemory(dim, mlp_ratio * dim, levels, variant)
        self.norm_memory = nn.Parameter(torch.ones(dim))
        self.norm_cms = nn.Parameter(torch.ones(dim))

    def state(self) -> tuple[TensorSpec, ...]:
        """See `UpdateRule.state`."""
        return self.memory.state()

    def learned(self, state: Tensors) -> dict[str, torch.Tensor]:
        """See `LeveledBlock.learned`."""
        return self.memory.memory(state)

    def read_packed(self, x: torch.Tensor, pool: Tensors, batch: Batch, place: Place) -> torch.Tensor:
        """See `LeveledBlock.read_packed`."""
        return x + self.memory.apply_packed(_norm(x, self.norm_memory), pool, batch)

    def read(self, x: torch.Tensor, state: Tensors, place: Place) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `LeveledBlock.read`; `place` is the session position of the first token."""
        out, new = self.memory.scan(_norm(x, self.norm_memory), state, place)
        return x + out, new

    def mix(self, x: torch.Tensor, changes: Sequence[Change] | None = None) -> torch.Tensor:
        """See `LeveledBlock.mix`."""
        mixed: torch.Tensor = self.cms(_norm(x, self.norm_cms), changes)
        return x + mixed


class BlockModel(LeveledModel):
    """A family made of blocks; a subclass chooses the rule and the config.

    fields  the levels of the last blocks; the last `adaptive_blocks` blocks have them
    """

    embed: nn.Parameter

    def __init__(
        self, vocab_size: int, dim: int, blocks: int, mlp_ratio: int, chunk: int, rule: Callable[[], UpdateRule],
        fields: LevelFields,
    ) -> None:  # fmt: skip
        super().__init__()
        levels = read_levels(fields, chunk, blocks)
        self.vocab_size, self.chunk = vocab_size, chunk
        self.embed = nn.Parameter(torch.randn(vocab_size, dim) * 0.02)
        first = blocks - fields.adaptive_blocks
        self.blocks = nn.ModuleList(
            Block(rule(), dim, mlp_ratio, levels if i >= first else (), fields.cms) for i in range(blocks)
        )
        self.norm = nn.Parameter(torch.ones(dim))
        self.adapt(levels, dim, fields)
        self.int8 = False  # whether the compiled code multiplies in int8
        self._body: Fused[Stack] = Fused()
        self._output: Fused[Linear] = Fused()

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """See `LanguageModel.forward`; one call of compiled code where there is one for these blocks."""
        stack = self._packed() if self.adaptation is None else None
        return super().forward(batch, pool) if stack is None else stack(batch, pool)

    def _packed(self) -> Stack | None:
        return self._body.get(self, lambda: pack_stack(self.blocks, self.embed, self.scale, self.norm, self.int8))

    def quantize(self) -> None:
        """Multiply with all matrices in int8; for serving. ConfigError: compiled code does not serve the model."""
        if self.adaptation is not None or self.embed.dtype != torch.float32 or not is_served(self.blocks, self.embed):
            raise ConfigError(
                "int8 weights need the C++ kernels (a CPU with g++, NESTED_KERNELS unset or 'native') and a HOPE "
                f"model of float32 matrices without levels; this is {type(self).__name__} in {self.embed.dtype}"
            )
        self.int8, self._body, self._output = True, Fused(), Fused()

    @property
    def scale(self) -> float:
        """sqrt(D), by which embeddings enter, so that tied weights serve the stream (rms near 1) and logits (small)."""
        return float(self.embed.shape[1] ** 0.5)

    def enter(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings times `scale`."""
        scaled: torch.Tensor = embedding(token_ids, self.embed) * self.scale
        return scaled

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """See `LeveledModel.leave`."""
        return _norm(x, self.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel.logits`."""
        output = self._output.get(self.embed, lambda: pack_output(self.blocks, self.embed, self.int8))
        if output is not None and hidden.dtype == self.embed.dtype:
            return output(hidden)
        return linear(hidden, self.embed).float() if hidden.dtype != torch.float64 else linear(hidden, self.embed)
