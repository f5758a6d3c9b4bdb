"""What the families share: a stack of blocks, each an update rule followed by a continuum memory, with tied embeddings.

Each block: x <- x + rule(norm(x)), then x <- x + cms(norm(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm

from nested_runtime.core import Batch
from nested_runtime.errors import StateError
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.cms import ContinuumMemory
from nested_runtime.memory.level import Change, Level
from nested_runtime.models.adaptation import Adaptation, LevelFields, Part, Stepped, read_levels, select
from nested_runtime.models.base import LanguageModel, Pool
from nested_runtime.state.spec import TensorSpec, prefixed

__all__ = ["Block", "BlockModel"]

NORM_EPS = 1e-6


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps=NORM_EPS)


class Block(nn.Module):
    """One update rule and a continuum memory whose static MLP is `mlp_ratio` times as wide as the stream."""

    def __init__(
        self, rule: UpdateRule, dim: int, mlp_ratio: int, levels: Sequence[Level] = (), variant: str = "sequential"
    ) -> None:
        super().__init__()
        self.memory = rule
        self.cms = ContinuumMemory(dim, mlp_ratio * dim, levels, variant)
        self.norm_memory = nn.Parameter(torch.ones(dim))
        self.norm_cms = nn.Parameter(torch.ones(dim))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What the rule reads of the stream x [.., D]."""
        return _norm(x, self.norm_memory)

    def mix(self, x: torch.Tensor, changes: Sequence[Change] | None = None) -> torch.Tensor:
        """The stream after the MLPs, [.., D], from that after the rule; `changes` are the sessions' levels."""
        mixed: torch.Tensor = self.cms(_norm(x, self.norm_cms), changes)
        return x + mixed


class BlockModel(LanguageModel):
    """A family made of blocks; a subclass chooses the rule and the config.

    fields  the levels of the last blocks; the last `adaptive_blocks` blocks have them
    """

    def __init__(
        self, vocab_size: int, dim: int, blocks: int, mlp_ratio: int, chunk: int, rule: Callable[[], UpdateRule],
        fields: LevelFields,
    ) -> None:  # fmt: skip
        super().__init__()
        levels = read_levels(fields, chunk, blocks)
        self.vocab_size, self.chunk = vocab_size, chunk
        self.embed = nn.Parameter(torch.randn(vocab_size, dim) * 0.02)
        self.first_adaptive = blocks - fields.adaptive_blocks if levels else blocks
        self.blocks = nn.ModuleList(
            Block(rule(), dim, mlp_ratio, levels if i >= self.first_adaptive else (), fields.cms) for i in range(blocks)
        )
        self.norm = nn.Parameter(torch.ones(dim))
        self.adaptation = self._adaptation(levels, dim) if levels else None
        self.levels, self.update_chunk = levels, levels[0].chunk if levels else 0

    def _adaptation(self, levels: tuple[Level, ...], dim: int) -> Adaptation:
        blocks = list(self._stack())[self.first_adaptive :]
        parts = [Part(name, block.memory, block.cms, block.inner, block.mix) for name, block in blocks]
        return Adaptation(levels, dim, parts)

    def _stack(self) -> Iterator[tuple[str, Block]]:
        for i, block in enumerate(self.blocks):
            yield f"blocks.{i}.memory", cast(Block, block)

    def state_spec(self) -> tuple[TensorSpec, ...]:
        """See `LanguageModel.state_spec`."""
        memories = tuple(spec for name, block in self._stack() for spec in prefixed(name, block.memory.state()))
        return memories + (self.adaptation.spec() if self.adaptation else ())

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """See `LanguageModel.forward`."""
        x = self._enter(batch.token_ids)
        learned = self.adaptation.learned(batch, pool) if self.adaptation else []
        for i, (name, block) in enumerate(self._stack()):
            local = {s.name: pool[f"{name}.{s.name}"] for s in block.memory.state()}
            x = x + block.memory.apply_packed(block.inner(x), local, batch)
            if self.adaptation is None or i < self.first_adaptive:
                x = block.mix(x)
                continue
            if i == self.first_adaptive:
                self.adaptation.record(x, batch, pool)
            part = self.adaptation.parts[i - self.first_adaptive]
            x = block.mix(x, self.adaptation.packed_changes(part, pool, learned))
        return _norm(x, self.norm)

    def scan(
        self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor] | None, position: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `LanguageModel.scan`."""
        new = dict(state if state is not None else self._fresh(tokens))
        if self.adaptation is None:
            return self._scan(tokens, new, position, 0)
        outs, begin = [], 0
        while begin < tokens.shape[1]:
            new, count = self._close(new, tokens[:, begin], position + begin)
            end = min(begin + self.update_chunk - count, tokens.shape[1])
            out, new = self._scan(tokens[:, begin:end], new, position + begin, count)
            outs.append(out)
            begin = end
        return torch.cat(outs, dim=1), new

    def _scan(
        self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor], position: int, count: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`scan` within one chunk, of which `count` tokens have been read."""
        x = self._enter(tokens)
        new = dict(state)
        for i, (name, block) in enumerate(self._stack()):
            local = {s.name: state[f"{name}.{s.name}"] for s in block.memory.state()}
            read, after = block.memory.scan(block.inner(x), local, position)
            new.update({f"{name}.{key}": tensor for key, tensor in after.items()})
            x = x + read
            if self.adaptation is None or i < self.first_adaptive:
                x = block.mix(x)
                continue
            if i == self.first_adaptive:
                new.update(self.adaptation.record_scan(x, tokens, state, count))
            part = self.adaptation.parts[i - self.first_adaptive]
            x = block.mix(x, self.adaptation.changes(part, state))
        return _norm(x, self.norm), new

    def _close(
        self, state: dict[str, torch.Tensor], next_token: torch.Tensor, position: int
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Take the step of the sessions whose chunk is full; the state, and how far into their chunk all are then."""
        counts = state["chunk.count"][:, 0]
        full = counts == self.update_chunk
        count = int(torch.where(full, 0, counts).max())
        if bool((torch.where(full, 0, counts) != count).any()):
            raise StateError(f"a scan needs sessions at one place of their chunks, got {counts.tolist()}")
        if not bool(full.any()):
            return state, count
        stepped = self._step_levels(state, next_token, position)
        return {**state, **{n: select(full, t, state[n]) for n, t in stepped.tensors.items()}}, count

    def _step_levels(self, state: Mapping[str, torch.Tensor], next_token: torch.Tensor, position: int) -> Stepped:
        if self.adaptation is None:
            raise StateError("this model has no levels to update")
        own = {name: state[name] for name in self.adaptation.names()}
        return self.adaptation.update(own, next_token, position, lambda x: self.logits(_norm(x, self.norm)))

    def update(self, slots: torch.Tensor, next_token: torch.Tensor, position: int, pool: Pool) -> Stepped:
        """See `LanguageModel.update`."""
        if self.adaptation is None:
            raise StateError("this model has no levels to update")
        own = {name: pool[name][slots] for name in self.adaptation.names()}
        stepped = self._step_levels(own, next_token, position)
        for name, tensor in stepped.tensors.items():
            pool[name][slots] = tensor.detach()
        return stepped

    def _fresh(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(self.embed.dtype, torch.float32)  # memories are never narrower (MODEL.md section 6)
        return {
            s.name: torch.zeros(
                (tokens.shape[0], *s.shape), dtype=dtype if s.dtype.is_floating_point else s.dtype, device=tokens.device
            )
            for s in self.state_spec()
        }

    def _enter(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings scaled by sqrt(D), so that tied weights serve the stream (rms near 1) and the logits (small)."""
        scaled: torch.Tensor = embedding(token_ids, self.embed) * self.embed.shape[1] ** 0.5
        return scaled

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel.logits`."""
        return linear(hidden, self.embed).float() if hidden.dtype != torch.float64 else linear(hidden, self.embed)
