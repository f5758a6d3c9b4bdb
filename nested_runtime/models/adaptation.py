"""How the levels of a stack's last blocks learn: what is recorded while a chunk is read, and the step it leads to.

A chunk is C_1 session tokens. While a session reads it, the stream that enters the first adaptive level is recorded
with the tokens, and the memories of the blocks behind it as they were at the chunk's start (the anchor). When the chunk
is full and the next token is known, all C_1 next-token losses are recomputed from there with gradients (the blocks
below do not depend on what adapts), every level adds the gradient to its sum, and the levels whose C_l tokens are
full take their step (NL Eq. 71). So the step is due exactly before the first token of the next chunk is read, and is a
function of the tokens read alone. Gradients do not pass the chunk's start; g and the old weights are constants of the
outer loss, the step size is not (first-order meta-learning).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nested_runtime.core import Batch
from nested_runtime.errors import StateError
from nested_runtime.memory.cms import ContinuumMemory, LevelStep, level_name
from nested_runtime.memory.level import Change, Level, Span, packed_change
from nested_runtime.state.spec import TensorSpec, prefixed

__all__ = ["Adaptation", "Part", "Stepped", "read_clock", "retained", "select"]

Tensors = Mapping[str, torch.Tensor]
SMALL, LARGE = 8, 32  # tokens of the last piece of a chunk at most, of any piece at most
SINCE, UPDATES, REFUSED = range(3)
"""Columns of a level's clock: tokens since its last step, steps taken, steps refused because they diverged."""


@dataclass(frozen=True)
class Part:
    """One adaptive block: the name of its memory, its levels, and how it computes.

    anchor  tensors of the memory, by its own names, that are copied when a chunk begins
    read    (stream before the block, the memory as it was, place) -> stream that enters the levels, and what it became
    mix     (stream that enters the levels, changes) -> stream after the block
    """

    name: str
    cms: ContinuumMemory
    anchor: tuple[TensorSpec, ...]
    read: Callable[[torch.Tensor, Tensors, Any], tuple[torch.Tensor, Tensors]]
    mix: Callable[[torch.Tensor, Sequence[Change] | None], torch.Tensor]


@dataclass(frozen=True)
class Stepped:
    """An update of B sessions: their new tensors, who was finite [B], the norm of each level's step [B, levels]."""

    tensors: dict[str, torch.Tensor]
    good: torch.Tensor
    norms: torch.Tensor


class Adaptation:
    """The recorder and the update of one model. `parts`: adaptive blocks, first to last; `recent`: see LevelFields."""

    def __init__(self, levels: tuple[Level, ...], dim: int, parts: Sequence[Part], recent: int = 0) -> None:
        self.levels, self.dim, self.parts, self.recent = levels, dim, tuple(parts), recent
        self.chunk = levels[0].chunk

    def spec(self) -> tuple[TensorSpec, ...]:
        """The chunk being read (level "fast": it goes with the fast memory), the levels' clocks and tensors."""
        chunk = [
            TensorSpec("chunk.count", (1,), torch.int64),
            TensorSpec("chunk.tokens", (self.chunk,), torch.int64),
            TensorSpec("chunk.stream", (self.chunk, self.dim)),
        ]
        for part in self.parts[1:]:
            chunk += prefixed(f"chunk.{part.name}", part.anchor)
        if self.recent:
            chunk += [
                TensorSpec("recent.count", (1,), torch.int64),
                TensorSpec("recent.tokens", (self.recent,), torch.int64),
            ]
        clocks = [TensorSpec(clock(n), (3,), torch.int64, level_name(n)) for n in range(len(self.levels))]
        weights = [spec for part in self.parts for spec in prefixed(cms(part), part.cms.state())]
        return (*chunk, *clocks, *weights)

    # ---- recording --------------------------------------------------------------------------------------------------

    def record(self, stream: torch.Tensor, batch: Batch, pool: Tensors) -> None:
        """Write what a packed step reads into `pool`; called when the blocks below the first adaptive level are done.

        stream [T, D]. The spans may not pass the end of a chunk.
        """
        slots, lengths = batch.slots.long(), batch.cu_seqlens.long().diff()
        slots, lengths = slots[keep := slots > 0], lengths[keep]
        kept = keep.repeat_interleave(batch.cu_seqlens.long().diff())
        count = pool["chunk.count"][slots, 0]
        if bool((count + lengths > self.chunk).any()):
            raise StateError(f"a step reads past the end of a chunk of {self.chunk} tokens; update the levels first")
        begin = slots[count == 0]
        for part in self.parts[1:]:
            for spec in part.anchor:
                name = f"{part.name}.{spec.name}"
                pool[f"chunk.{name}"][begin] = pool[name][begin]
        owner = torch.arange(len(slots), device=slots.device).repeat_interleave(lengths)
        within = torch.arange(len(owner), device=slots.device) - (lengths.cumsum(0) - lengths)[owner]
        place = (slots[owner], count[owner] + within)
        pool["chunk.tokens"][place] = batch.token_ids[kept]
        pool["chunk.stream"][place] = stream[kept].to(pool["chunk.stream"].dtype)
        pool["chunk.count"][slots, 0] = count + lengths

    def record_scan(self, stream: torch.Tensor, tokens: torch.Tensor, state: Tensors, count: int) -> dict[str, Any]:
        """`record` without writing: tensors of B sessions which have `count` tokens of their chunk, after T more."""
        stop = count + tokens.shape[1]
        old = state["chunk.stream"]
        new = {
            "chunk.count": torch.full_like(state["chunk.count"], stop),
            "chunk.tokens": torch.cat([state["chunk.tokens"][:, :count], tokens, state["chunk.tokens"][:, stop:]], 1),
            "chunk.stream": torch.cat([old[:, :count], stream.detach().to(old.dtype), old[:, stop:]], 1),
        }
        for part in self.parts[1:]:
            for spec in part.anchor:
                name = f"{part.name}.{spec.name}"
                new[f"chunk.{name}"] = state[name].detach() if count == 0 else state[f"chunk.{name}"]
        return new

    # ---- reading with deltas ----------------------------------------------------------------------------------------

    def changes(self, part: Part, state: Tensors) -> list[Change]:
        """The levels of `part` with the deltas of B sessions, for streams [B, T, D]."""
        prefix = f"{cms(part)}."
        local = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        return [self._whole(part, n, part.cms.deltas(n, local)) for n in range(len(self.levels))]

    def _whole(self, part: Part, number: int, delta: Tensors) -> Change:
        mlp = part.cms.level(number)
        return lambda which, x, y: y + mlp.delta_of(which, x, delta)

    def packed_changes(self, part: Part, pool: Tensors, learned: Sequence[Sequence[Span]]) -> list[Change]:
        """The same for packed streams [T, D]: `learned` says per level whose delta is not zero."""
        local = local_of(part, pool)
        return [packed_change(part.cms.level(n), part.cms.deltas(n, local), spans) for n, spans in enumerate(learned)]

    def learned(self, batch: Batch, pool: Tensors) -> list[list[Span]]:
        """Per level, slot and rows of the sessions that have taken a step: the others read with the start alone."""
        slots, bounds = batch.slots.tolist(), batch.cu_seqlens.tolist()
        index = batch.slots.long()
        steps = torch.stack([pool[clock(n)][index, UPDATES] for n in range(len(self.levels))]).tolist()
        spans = [(slot, bounds[b], bounds[b + 1]) for b, slot in enumerate(slots)]
        return [[span for span, taken in zip(spans, row, strict=True) if taken and span[1] < span[2]] for row in steps]

    # ---- the update -------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The state tensors that an update reads and writes."""
        return [spec.name for spec in self.spec()]

    @property
    def pieces(self) -> tuple[int, ...]:
        """Where the pieces end that a chunk's gradient may be summed from; one, if the chunk is needed as a whole.

        Behind the first adaptive level a token's loss depends on that token alone, unless another memory follows. Each
        piece is three quarters of what is left, so that little is left to do when the chunk is full.
        """
        if len(self.parts) > 1 or any(level.rule().needs_inputs for level in self.levels):
            return (self.chunk,)
        ends = [0]
        while (left := self.chunk - ends[-1]) > SMALL:
            ends.append(ends[-1] + min(LARGE, left - left // 4))
        return (*ends[1:], self.chunk)

    def update(
        self, state: Tensors, before: Tensors, next_token: torch.Tensor, place: Any,
        logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> Stepped:  # fmt: skip
        """Close the full chunk of B sessions whose next token is known.

        state: the tensors `names()`, [B, ..]; before: the memories of all parts but the first when the chunk began;
        place: where the chunk stands, for `Part.read`; next_token [B]; logits: stream behind the last block
        [B, C_1, D] -> [B, C_1, V]. A session whose losses, gradients or new weights are not finite keeps its levels.
        """
        inputs: dict[str, torch.Tensor] = {}
        return self.apply(state, self.gradients(state, before, next_token, place, logits, inputs), inputs)

    def gradients(
        self, state: Tensors, before: Tensors, next_token: torch.Tensor, place: Any,
        logits: Callable[[torch.Tensor], torch.Tensor], inputs: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Gradients [B, ..] by delta, and the "loss" [B], of the tokens in "chunk.tokens" and "chunk.stream".

        They add up over the pieces of a chunk. inputs: filled with what the matrices were multiplied with.
        """
        leaves = {name: t.detach().requires_grad_() for name, t in state.items() if ".delta." in name}
        with torch.enable_grad():
            losses = self._losses({**state, **leaves}, before, next_token, place, logits, inputs)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True)) | {"loss": losses.detach()}

    def _losses(
        self, state: Tensors, before: Tensors, next_token: torch.Tensor, place: Any,
        logits: Callable[[torch.Tensor], torch.Tensor], inputs: dict[str, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Summed next-token loss of the chunk, [B]."""
        x = state["chunk.stream"].detach()
        x = x.to(self.parts[0].cms.dtype) if not torch.is_autocast_enabled(x.device.type) else x
        for index, part in enumerate(self.parts):
            if index:
                prefix = f"{part.name}."
                memory = {n.removeprefix(prefix): t.detach() for n, t in before.items() if n.startswith(prefix)}
                x = part.read(x, memory, place)[0]
            x = part.mix(x, self._watched(part, state, inputs))
        targets = torch.cat([state["chunk.tokens"][:, 1:], next_token[:, None]], dim=1)
        losses = cross_entropy(logits(x).flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).sum(1)

    def _watched(self, part: Part, state: Tensors, inputs: dict[str, torch.Tensor]) -> list[Change]:
        """The changes, keeping what each matrix was multiplied with for the optimizers that need it."""
        changes = self.changes(part, state)
        return [
            self._watch(change, f"{cms(part)}.{n + 1}", inputs) if self.levels[n].rule().needs_inputs else change
            for n, change in enumerate(changes)
        ]

    def _watch(self, change: Change, prefix: str, inputs: dict[str, torch.Tensor]) -> Change:
        def watched(which: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            inputs[f"{prefix}.{which}"] = x.detach()
            return change(which, x, y)

        return watched

    def apply(self, state: Tensors, gradients: Tensors, inputs: Tensors) -> Stepped:
        """Every level adds the chunk's gradient to its sum; those whose C_l tokens are full step, fastest first."""
        finite = all_finite(gradients)
        new = {name: torch.zeros_like(t) if name.startswith("chunk.") else t for name, t in state.items()}
        if self.recent:
            tokens = torch.cat([state["recent.tokens"], state["chunk.tokens"]], dim=1)
            new["recent.tokens"] = tokens[:, -self.recent :]
            new["recent.count"] = (state["recent.count"] + self.chunk).clamp(max=self.recent)
        good, norms = finite, []
        for number, level in enumerate(self.levels):
            since = state[clock(number)][:, SINCE] + self.chunk
            due = since >= level.chunk
            took, norm = self._advance(number, new, gradients, inputs, due, finite)
            good = good & (took | ~due)
            norms.append(torch.where(took, norm, 0.0))
            counted = state[clock(number)][:, UPDATES:] + torch.stack([took, due & ~took], dim=1)
            new[clock(number)] = torch.cat([torch.where(due, 0, since)[:, None], counted], dim=1)
        return Stepped(new, good, torch.stack(norms, dim=1))

    def _advance(
        self, number: int, new: dict[str, torch.Tensor], gradients: Tensors, inputs: Tensors, due: torch.Tensor,
        finite: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Let one level add up or step, in `new`; who took a step [B], its norm over all blocks [B]."""
        totals, keys = [], []
        for part in self.parts:
            prefix = f"{cms(part)}.{number + 1}"
            total = {}
            for name in part.cms.level(number).shapes():
                gradient, sum_name = gradients[f"{prefix}.delta.{name}"], f"{prefix}.sum.{name}"
                total[name] = select(finite, gradient, torch.zeros_like(gradient))
                if sum_name in new:
                    total[name] = total[name] + new[sum_name]
                    new[sum_name] = select(due, torch.zeros_like(gradient), total[name])
            totals.append(total)
            keys.append({name: inputs[f"{prefix}.{name}"] for name in total if f"{prefix}.{name}" in inputs})
        if not bool(due.any()):
            return torch.zeros_like(due), torch.zeros_like(finite, dtype=self._float(new))
        return self._take(number, new, totals, keys, due & finite)

    def _take(
        self, number: int, new: dict[str, torch.Tensor], totals: Sequence[Tensors], keys: Sequence[Tensors],
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Step one level of the sessions in `mask` [B] along the gradients of all parts, in `new`; see `_advance`."""
        steps: list[LevelStep] = [
            part.cms.step(number, local_of(part, new), total, inputs)
            for part, total, inputs in zip(self.parts, totals, keys, strict=True)
        ]
        took = torch.stack([step.finite for step in steps]).all(0) & mask
        for part, step in zip(self.parts, steps, strict=True):
            for name, tensor in step.tensors.items():
                new[f"{cms(part)}.{name}"] = select(took, tensor, new[f"{cms(part)}.{name}"])
            if part.cms.variant == "nested":
                self._restart(number, part, new, took)
        return took, torch.stack([step.norm for step in steps]).square().sum(0).sqrt()

    def consolidate(self, state: Tensors, gradients: Tensors, into: Sequence[int]) -> Stepped:
        """One more step of the levels `into` along `gradients`, outside their clocks."""
        finite, new, good, norms = all_finite(gradients), dict(state), [], []
        for number in into:
            totals = []
            for part in self.parts:
                names = part.cms.level(number).shapes()
                found = {name: gradients[f"{cms(part)}.{number + 1}.delta.{name}"] for name in names}
                totals.append({name: select(finite, g, torch.zeros_like(g)) for name, g in found.items()})
            took, norm = self._take(number, new, totals, [{} for _ in totals], finite)
            since, counts = state[clock(number)][:, :UPDATES], state[clock(number)][:, UPDATES:]
            new[clock(number)] = torch.cat([since, counts + torch.stack([took, ~took], dim=1)], dim=1)
            good.append(took)
            norms.append(torch.where(took, norm, 0.0))
        return Stepped(new, torch.stack(good).all(0), torch.stack(norms, dim=1))

    def decay(self, state: Tensors, levels: Sequence[int], factor: float) -> dict[str, torch.Tensor]:
        """The deltas of `levels` times `factor`: back towards the learned start."""
        names = {f"{cms(part)}.{n + 1}.delta." for part in self.parts for n in levels}
        return {name: t * factor if any(map(name.startswith, names)) else t for name, t in state.items()}

    def _restart(self, number: int, part: Part, new: dict[str, torch.Tensor], took: torch.Tensor) -> None:
        """Faster levels begin again from level `number`, which has stepped (NL Eq. 72)."""
        for faster in range(number):
            for name, old in new.items():
                rest = name.removeprefix(f"{cms(part)}.{faster + 1}.")
                if rest.startswith("delta."):
                    new[name] = select(took, new[f"{cms(part)}.{number + 1}.{rest}"], old)
                elif rest.startswith("opt."):
                    new[name] = select(took, torch.zeros_like(old), old)

    def _float(self, state: Tensors) -> torch.dtype:
        return state["chunk.stream"].dtype


def cms(part: Part) -> str:
    """Prefix of the state tensors of a block's levels."""
    return part.name.removesuffix("memory") + "cms"


def clock(number: int) -> str:
    """State tensor that counts a level's tokens and steps."""
    return f"{level_name(number)}.clock"


def read_clock(state: Tensors, number: int) -> tuple[int, int, int]:
    """Of one session's state: tokens since level `number` stepped or tried to, steps taken, steps refused."""
    since, taken, refused = state[clock(number)].tolist()
    return since + int(state["chunk.count"][0]), taken, refused


def retained(state: Tensors) -> torch.Tensor:
    """Of one session's state: the tokens read last that it still holds, oldest first [N]."""
    unfinished = state["chunk.tokens"][: int(state["chunk.count"][0])]
    if "recent.tokens" not in state:
        return unfinished
    tokens = state["recent.tokens"]
    return torch.cat([tokens[len(tokens) - int(state["recent.count"][0]) :], unfinished])


def all_finite(tensors: Tensors) -> torch.Tensor:
    """Which sessions [B] have nothing but finite numbers in `tensors` [B, ..]."""
    return torch.stack([t.reshape(len(t), -1).isfinite().all(1) for t in tensors.values()]).all(0)


def local_of(part: Part, state: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of a block's levels by the names the block knows."""
    return {spec.name: state[f"{cms(part)}.{spec.name}"] for spec in part.cms.state()}


def select(mask: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """Rows of `yes` where mask [B], else of `no`."""
    return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)
