"""What the families share: a stack of blocks, each an update rule followed by a continuum memory, with tied embeddings.

Each block: x <- x + rule(norm(x)), then x <- x + cms(norm(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm

from nested_runtime.core import Batch
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.cms import ContinuumMemory, Level
from nested_runtime.models.base import LanguageModel, Pool
from nested_runtime.state.spec import TensorSpec, prefixed

__all__ = ["Block", "BlockModel"]

NORM_EPS = 1e-6


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps=NORM_EPS)


class Block(nn.Module):
    """One update rule and a static MLP `mlp_ratio` times as wide as the stream."""

    def __init__(self, rule: UpdateRule, dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.memory = rule
        self.cms = ContinuumMemory(dim, [Level("static", mlp_ratio * dim)])
        self.norm_memory = nn.Parameter(torch.ones(dim))
        self.norm_cms = nn.Parameter(torch.ones(dim))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What the rule reads of the stream x [.., D]."""
        return _norm(x, self.norm_memory)

    def add(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The stream after the rule's output `read` and the MLP, [.., D]."""
        x = x + read
        mixed: torch.Tensor = self.cms(_norm(x, self.norm_cms))
        return x + mixed


class BlockModel(LanguageModel):
    """A family made of blocks; a subclass chooses the rule and the config."""

    def __init__(self, vocab_size: int, dim: int, blocks: int, mlp_ratio: int, rule: Callable[[], UpdateRule]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = nn.Parameter(torch.randn(vocab_size, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(rule(), dim, mlp_ratio) for _ in range(blocks))
        self.norm = nn.Parameter(torch.ones(dim))

    def _stack(self) -> Iterator[tuple[str, Block]]:
        for i, block in enumerate(self.blocks):
            yield f"blocks.{i}.memory", cast(Block, block)

    def state_spec(self) -> tuple[TensorSpec, ...]:
        """See `LanguageModel.state_spec`."""
        return tuple(spec for name, block in self._stack() for spec in prefixed(name, block.memory.state()))

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """See `LanguageModel.forward`."""
        x = self._enter(batch.token_ids)
        for name, block in self._stack():
            local = {s.name: pool[f"{name}.{s.name}"] for s in block.memory.state()}
            x = block.add(x, block.memory.apply_packed(block.inner(x), local, batch))
        return _norm(x, self.norm)

    def scan(
        self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor] | None, position: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `LanguageModel.scan`."""
        x = self._enter(tokens)
        start = state if state is not None else self._fresh(tokens)
        new: dict[str, torch.Tensor] = {}
        for name, block in self._stack():
            local = {s.name: start[f"{name}.{s.name}"] for s in block.memory.state()}
            read, after = block.memory.scan(block.inner(x), local, position)
            new.update({f"{name}.{key}": tensor for key, tensor in after.items()})
            x = block.add(x, read)
        return _norm(x, self.norm), new

    def _fresh(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(self.embed.dtype, torch.float32)  # memories are never narrower (MODEL.md section 6)
        shapes = {s.name: (tokens.shape[0], *s.shape) for s in self.state_spec()}
        return {name: torch.zeros(shape, dtype=dtype, device=tokens.device) for name, shape in shapes.items()}

    def _enter(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings scaled by sqrt(D), so that tied weights serve the stream (rms near 1) and the logits (small)."""
        scaled: torch.Tensor = embedding(token_ids, self.embed) * self.embed.shape[1] ** 0.5
        return scaled

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel.logits`."""
        return linear(hidden, self.embed).float() if hidden.dtype != torch.float64 else linear(hidden, self.embed)
