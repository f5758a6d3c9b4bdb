"""Runner: one packed forward pass over the slots of a pool, and which sequences came out of it non-finite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import isfinite
from typing import NamedTuple

import torch

from nested_runtime.core import Batch
from nested_runtime.engine.graphs import DecodeGraphs
from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.models.base import LanguageModel
from nested_runtime.state.pool import SlotPool
from nested_runtime.state.spec import TensorSpec

__all__ = ["Runner", "Span", "StepOutput", "state_specs"]


class Span(NamedTuple):
    """What one sequence reads in a step.

    rows: offsets into `tokens` whose next-token logits are wanted, ascending
    """

    slot: int
    position: int
    tokens: list[int]
    rows: range


@dataclass(frozen=True)
class StepOutput:
    """What a step gave.

    logits: [R, V] float32 on CPU, the rows of the spans one after another
    ends: per span, the first row behind its own
    bad: indices of spans with non-finite results
    """

    logits: torch.Tensor
    ends: list[int]
    bad: set[int]


class Runner:
    """Packs spans into persistent buffers and runs the model on them.

    max_tokens, max_sequences: the most one step may hold
    graphs: how decode steps are repeated; None = from CUDA graphs where the device and the model allow it, else not
    """

    def __init__(
        self,
        model: LanguageModel,
        pool: SlotPool,
        *,
        max_tokens: int,
        max_sequences: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.device = pool.device
        self._token_ids = _Buffer(max_tokens, torch.int64, self.device)
        self._cu_seqlens = _Buffer(max_sequences + 1, torch.int32, self.device)
        self._slots = _Buffer(max_sequences, torch.int32, self.device)
        self._positions = _Buffer(max_sequences, torch.int64, self.device)
        is_cuda = self.device.type == "cuda"
        if graphs is None and is_cuda and model.is_capturable and packed_kernels("cuda", torch.float32) is not None:
            graphs = DecodeGraphs(lambda batch: model(batch, pool.tensors), max_sequences, self.device)
        self.graphs = graphs

    @torch.inference_mode()
    def step(self, spans: list[Span]) -> StepOutput:
        """Read the spans; the pool's slots are updated in place."""
        batch = self._pack(spans)
        if self.graphs is not None and self.graphs.fits(batch):
            hidden = self.graphs.run(batch)
        else:
            hidden = self.model(batch, self.pool.tensors)
        logits = self._logits(hidden, spans)
        num_rows = [len(span.rows) for span in spans]
        bad = set(_bad(logits, num_rows))
        if len(logits) < len(hidden):  # a state that is not finite shows in every logit: look where there are none
            bad.update(_bad(hidden, [len(span.tokens) for span in spans]))
        return StepOutput(logits, list(accumulate(num_rows)), bad)

    def _logits(self, hidden: torch.Tensor, spans: list[Span]) -> torch.Tensor:
        """Next-token logits [R, V] of the wanted rows of hidden [T, D]."""
        wanted: list[int] = []
        start = 0
        for span in spans:
            wanted += [start + row for row in span.rows]
            start += len(span.tokens)
        if not wanted:
            return torch.empty(0, self.model.vocab_size)
        if len(wanted) < hidden.shape[0]:
            hidden = hidden[torch.tensor(wanted, device=self.device)]
        return self.model.logits(hidden).to("cpu", torch.float32)

    def _pack(self, spans: list[Span]) -> Batch:
        tokens = [token for span in spans for token in span.tokens]
        slots, lengths = [span.slot for span in spans], [len(span.tokens) for span in spans]
        ends = list(accumulate(lengths, initial=0))
        return Batch(
            token_ids=self._token_ids.fill(tokens),
            cu_seqlens=self._cu_seqlens.fill(ends),
            slots=self._slots.fill(slots),
            positions=self._positions.fill([span.position for span in spans]),
            kv=self.pool.extend(slots, lengths),
            longest=max(lengths, default=0),
        )


class _Buffer:
    """Host memory that lists of integers are written to at every step, pinned where they go to a GPU."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.tensor = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")
        self.array = self.tensor.numpy()
        self._views: dict[int, torch.Tensor] = {}  # making one takes longer than the copy

    def fill(self, values: list[int]) -> torch.Tensor:
        """The values on the device; valid until the next call."""
        count = len(values)
        self.array[:count] = values
        view = self._views.get(count)
        if view is None:
            view = self._views[count] = self.tensor[:count]
        return view if self.device.type == "cpu" else view.to(self.device, non_blocking=True)


def _pieces(rows: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Views of consecutive rows, one per length."""
    ends = list(accumulate(lengths))
    return [rows[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _bad(rows: torch.Tensor, lengths: list[int]) -> list[int]:
    """Indices of the pieces of `rows` with a NaN or an infinity."""
    if isfinite(rows.sum().item()):  # then so are all terms
        return []
    return [index for index, piece in enumerate(_pieces(rows, lengths)) if not bool(piece.isfinite().all())]


def state_specs(model: LanguageModel) -> tuple[TensorSpec, ...]:
    """The model's state tensors, floats widened to float64 for a float64 model."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.dtype != torch.float64:
        return model.state_spec()
    return tuple(replace(s, dtype=torch.float64) if s.dtype.is_floating_point else s for s in model.state_spec())
