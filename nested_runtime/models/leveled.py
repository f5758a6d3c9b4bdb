"""What families with levels share: a stack of blocks, the last of which learn while a session reads.

Each block: x <- read(x) by its memory, then x <- mix(x) by its MLPs. A family chooses the blocks and how tokens enter
and leave the stack; packed reading, `scan` and the update of the levels are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nested_runtime.core import Batch, KVRows
from nested_runtime.errors import StateError
from nested_runtime.memory.cms import ContinuumMemory
from nested_runtime.memory.frozen import Weight
from nested_runtime.memory.level import Change, Level
from nested_runtime.models.adaptation import Adaptation, Part, Stepped, select
from nested_runtime.models.base import LanguageModel, Pool
from nested_runtime.models.level_fields import LevelFields
from nested_runtime.state.spec import TensorSpec, prefixed

__all__ = ["LeveledBlock", "LeveledModel"]

Tensors = Mapping[str, torch.Tensor]
Place = Any
"""Where in the session tokens stand, as the family's memories want it (see `LeveledModel.place`)."""


class LeveledBlock(nn.Module, ABC):
    """A memory and a continuum memory `cms`. Tensors of the memory go by the memory's own names here."""

    cms: ContinuumMemory

    @abstractmethod
    def state(self) -> tuple[TensorSpec, ...]:
        """State tensors of the memory."""

    def learned(self, state: Tensors) -> dict[str, torch.Tensor]:
        """See `UpdateRule.memory`."""
        return dict(state)

    @abstractmethod
    def read_packed(self, x: torch.Tensor, pool: Tensors, batch: Batch, place: Place) -> torch.Tensor:
        """The stream [T, D] after the memory, whose tensors in `pool` are updated in place."""

    @abstractmethod
    def read(self, x: torch.Tensor, state: Tensors, place: Place) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The stream [B, T, D] after the memory and the memory's new state; pure and differentiable."""

    @abstractmethod
    def mix(self, x: torch.Tensor, changes: Sequence[Change] | None = None) -> torch.Tensor:
        """The stream after the MLPs, [.., D], from that after the memory; `changes` are the sessions' levels."""


class LeveledModel(LanguageModel):
    """A family made of `blocks`. A subclass calls `adapt` when they are there."""

    embed: Weight
    blocks: nn.ModuleList
    adaptation: Adaptation | None = None
    first_adaptive: int

    def adapt(self, levels: tuple[Level, ...], dim: int, fields: LevelFields) -> None:
        """Let the last `adaptive_blocks` blocks learn; none without levels."""
        stack = list(self._stack())
        self.levels, self.first_adaptive = levels, len(stack) - fields.adaptive_blocks if levels else len(stack)
        if not levels:
            return
        learning = stack[self.first_adaptive :]
        parts = [Part(name, block.cms, self.anchor(block), block.read, block.mix) for name, block in learning]
        self.adaptation, self.update_chunk = Adaptation(levels, dim, parts, fields.recent), levels[0].chunk
        self.pieces = self.adaptation.pieces

    def _stack(self) -> Iterator[tuple[str, LeveledBlock]]:
        for i, block in enumerate(self.blocks):
            yield f"blocks.{i}.memory", block  # type: ignore[misc]  # ModuleList yields modules

    # ---- what a family chooses --------------------------------------------------------------------------------------

    @abstractmethod
    def enter(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The stream [.., D] that tokens [..] begin as."""

    @abstractmethod
    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states from the stream behind the last block (the last norm)."""

    def packed_place(self, batch: Batch) -> Place:
        """Where the tokens of a packed batch stand."""
        return batch.positions

    def place(self, begin: int | torch.Tensor, length: int) -> Place:
        """Where `length` tokens from session position `begin` on stand; [B] positions are equal modulo `period`."""
        return begin if isinstance(begin, int) else int(begin[0])

    def anchor(self, block: LeveledBlock) -> tuple[TensorSpec, ...]:
        """Tensors of a block's memory that are copied when a chunk begins, for `before`."""
        return block.state()

    def before(self, state: Tensors) -> dict[str, torch.Tensor]:
        """The memories of the adaptive blocks as they were when the full chunk of B sessions began, by state name."""
        return {name.removeprefix("chunk."): t for name, t in state.items() if name.startswith("chunk.blocks.")}

    def before_packed(self, pool: Pool, slots: torch.Tensor, kv: KVRows | None) -> dict[str, torch.Tensor]:
        """`before` of the sessions in `slots`; kv says where their growing tensors lie."""
        return {name.removeprefix("chunk."): t[slots] for name, t in pool.items() if name.startswith("chunk.blocks.")}

    # ---- what they share --------------------------------------------------------------------------------------------

    def state_spec(self) -> tuple[TensorSpec, ...]:
        """See `LanguageModel.state_spec`."""
        memories = tuple(spec for name, block in self._stack() for spec in prefixed(name, block.state()))
        return memories + (self.adaptation.spec() if self.adaptation else ())

    def memory(self, state: Tensors) -> dict[str, torch.Tensor]:
        """See `LanguageModel.memory`: what the memories have learned, and the deltas of the levels."""
        found = {name: tensor for name, tensor in state.items() if ".delta." in name}
        for name, block in self._stack():
            own = {spec.name: state[f"{name}.{spec.name}"] for spec in block.state()}
            found |= {f"{name}.{key}": tensor for key, tensor in block.learned(own).items()}
        return found

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """See `LanguageModel.forward`."""
        x, place = self.enter(batch.token_ids), self.packed_place(batch)
        learned = self.adaptation.learned(batch, pool) if self.adaptation else []
        for i, (name, block) in enumerate(self._stack()):
            x = block.read_packed(x, {s.name: pool[f"{name}.{s.name}"] for s in block.state()}, batch, place)
            if self.adaptation is None or i < self.first_adaptive:
                x = block.mix(x)
                continue
            if i == self.first_adaptive:
                self.adaptation.record(x, batch, pool)
            part = self.adaptation.parts[i - self.first_adaptive]
            x = block.mix(x, self.adaptation.packed_changes(part, pool, learned))
        return self.leave(x)

    def scan(
        self, tokens: torch.Tensor, state: Tensors | None, position: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `LanguageModel.scan`."""
        new = dict(state if state is not None else self.fresh(tokens))
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
        self, tokens: torch.Tensor, state: Tensors, position: int, count: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`scan` within one chunk, of which `count` tokens have been read."""
        x, place = self.enter(tokens), self.place(position, tokens.shape[1])
        new = dict(state)
        for i, (name, block) in enumerate(self._stack()):
            x, after = block.read(x, {s.name: state[f"{name}.{s.name}"] for s in block.state()}, place)
            new.update({f"{name}.{key}": tensor for key, tensor in after.items()})
            if self.adaptation is None or i < self.first_adaptive:
                x = block.mix(x)
                continue
            if i == self.first_adaptive:
                new.update(self.adaptation.record_scan(x, tokens, state, count))
            part = self.adaptation.parts[i - self.first_adaptive]
            x = block.mix(x, self.adaptation.changes(part, state))
        return self.leave(x), new

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
        positions = torch.full_like(counts, position)
        stepped = self._step_levels(state, self.before(state), next_token, positions)
        return {**state, **{n: select(full, t, state[n]) for n, t in stepped.tensors.items()}}, count

    def _step_levels(
        self, state: Tensors, before: Tensors, next_token: torch.Tensor, positions: torch.Tensor
    ) -> Stepped:
        if self.adaptation is None:
            raise StateError("this model has no levels to update")
        own = {name: state[name] for name in self.adaptation.names()}
        place = self.place(positions - self.update_chunk, self.update_chunk)
        return self.adaptation.update(own, before, next_token, place, lambda x: self.logits(self.leave(x)))

    def update(
        self, slots: torch.Tensor, next_token: torch.Tensor, positions: torch.Tensor, pool: Pool,
        kv: KVRows | None = None, gradients: Tensors | None = None,
    ) -> Stepped:  # fmt: skip
        """See `LanguageModel.update`."""
        if self.adaptation is None:
            raise StateError("this model has no levels to update")
        own = {name: pool[name][slots] for name in self.adaptation.names()}
        if gradients is not None:
            stepped = self.adaptation.apply(own, gradients, {})
        else:
            stepped = self._step_levels(own, self.before_packed(pool, slots, kv), next_token, positions)
        for name, tensor in stepped.tensors.items():
            pool[name][slots] = tensor.detach()
        return stepped

    def gradients(
        self, slots: torch.Tensor, begin: int, end: int, next_token: torch.Tensor, pool: Pool
    ) -> dict[str, torch.Tensor]:
        """See `LanguageModel.gradients`."""
        if self.adaptation is None:
            raise StateError("this model has no levels to update")
        own = {name: pool[name][slots] for name in self.adaptation.names() if ".delta." in name}
        own |= {name: pool[name][slots, begin:end] for name in ("chunk.tokens", "chunk.stream")}
        return self.adaptation.gradients(own, {}, next_token, None, lambda x: self.logits(self.leave(x)), {})

    def read_again(
        self, tokens: torch.Tensor, next_token: torch.Tensor, state: Tensors, position: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gradients of tokens [B, n], n <= C_1, read from `state` with the levels as they are, and the state after.

        For `Adaptation.consolidate`: nothing is recorded, no level steps.
        """
        if self.adaptation is None:
            raise StateError("this model has no levels to update")
        learning = tuple(f"{part.name}." for part in self.adaptation.parts[1:])
        before = {name: t for name, t in state.items() if name.startswith(learning)}
        length = tokens.shape[1]
        with torch.no_grad():
            _, after = self._scan(tokens, state, position, 0)
        own = {name: after[name] for name in self.adaptation.names()}
        own |= {name: after[name][:, :length] for name in ("chunk.tokens", "chunk.stream")}
        place = self.place(position, length)
        found = self.adaptation.gradients(own, before, next_token, place, lambda x: self.logits(self.leave(x)), {})
        return found, {**after, "chunk.count": state["chunk.count"]}

    def fresh(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fresh state of B sessions, on the device of `tokens` [B, ..]."""
        wide = torch.promote_types(self.embed.dtype, torch.float32)  # memories are never narrower (MODEL.md section 6)
        return {
            s.name: torch.zeros(
                (tokens.shape[0], *s.fresh_shape), dtype=wide if s.dtype.is_floating_point else s.dtype,
                device=tokens.device,
            )
            for s in self.state_spec()
        }  # fmt: skip
