"""Decode steps replayed from CUDA graphs: one graph per batch size, smaller batches padded with slot 0.

A decode step of a HOPE model is a few hundred short kernels whose launches cost the host more than the device needs to
run them. A graph launches them at once. It reads its inputs at fixed addresses, so a step copies them there; what it
was captured with besides (the pool, the weights) never moves. Capturing runs on slot 0 alone and changes no session.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError

__all__ = ["Capture", "DecodeGraphs", "cuda_capture", "graph_sizes"]

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Takes a step that reads fixed inputs; returns what repeats it on their present contents, into the same output."""

WARM_UPS = 3


def cuda_capture(step: Step) -> Step:
    """The step as a CUDA graph, warmed up first: kernels are compiled and workspaces made outside the capture."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes worth a graph: powers of two up to 16, then steps of 16, then `largest` itself."""
    sizes = {1, 2, 4, 8, *range(16, largest, 16), largest}
    return sorted(size for size in sizes if size <= largest)


class DecodeGraphs:
    """Runs decode batches (one token of each sequence) through captured graphs, captured when first needed.

    forward  batch -> hidden states [T, D], touching nothing but the batch, the weights and the pool, never waiting
    """

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        largest: int,
        device: torch.device,
        capture: Capture = cuda_capture,
    ) -> None:
        if largest < 1:
            raise ConfigError(f"the largest decode batch must have at least 1 sequence, got {largest}")
        self.sizes = graph_sizes(largest)
        self._forward, self._capture, self._device = forward, capture, device
        self._graphs: dict[int, tuple[Batch, Step]] = {}

    @property
    def num_captured(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    @staticmethod
    def fits(batch: Batch) -> bool:
        """Whether the batch is a decode step that a graph can run: one token of each sequence, nothing that grows."""
        return batch.longest == 1 and batch.kv is None and len(batch.token_ids) == len(batch.slots)

    def run(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, D] of a batch that `fits`; valid until the next call."""
        num = len(batch.slots)
        if num > self.sizes[-1]:
            raise ConfigError(f"a decode batch of {num} is over the largest graph, {self.sizes[-1]}")
        size = self.sizes[bisect_left(self.sizes, num)]
        if size not in self._graphs:
            inputs = self._padding(size)
            self._graphs[size] = inputs, self._capture(lambda: self._forward(inputs))
        inputs, replay = self._graphs[size]
        for name in ("token_ids", "slots", "positions"):
            buffer = getattr(inputs, name)
            buffer[:num].copy_(getattr(batch, name), non_blocking=True)
            buffer[num:].zero_()
        return replay()[:num]

    def _padding(self, size: int) -> Batch:
        """A batch of padding only, at addresses that stay."""

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=self._device)

        ends = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        return Batch(zeros(torch.int64), ends, zeros(torch.int32), zeros(torch.int64), longest=1)
