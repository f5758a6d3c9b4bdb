"""Sequences through the real engine, with memories that go from one to the next: what the studies read with."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from nested_runtime.core import SamplingParams, Sequence, TokenLogprobs, TurnResult
from nested_runtime.engine.engine import Engine
from nested_runtime.errors import NestedError
from nested_runtime.kernels.denormals import flushed_denormals
from nested_runtime.models.loading import LoadedModel

__all__ = ["Outcome", "Reader", "Reading"]


@dataclass(frozen=True)
class Reading:
    """Tokens to read from a memory (None = fresh); `keep` what is remembered then; `answer` up to so many tokens."""

    tokens: Many[int]
    memory: TurnResult | None = None
    keep: bool = False
    score: bool = False
    answer: int = 0


@dataclass(frozen=True)
class Outcome:
    """The memory if kept, log-probabilities of the tokens read if scored (None for the first), tokens answered."""

    memory: TurnResult | None
    logprobs: tuple[TokenLogprobs | None, ...]
    answer: tuple[int, ...]


class Reader:
    """Runs readings side by side in one engine. `slots`: sequences of one step."""

    def __init__(self, loaded: LoadedModel, *, slots: int = 32, max_batch_tokens: int = 1024) -> None:
        self.loaded = loaded
        self._engine = Engine(
            loaded.model,
            capacity=slots,
            end_tokens=(loaded.tokenizer.end_id,),
            max_batch_tokens=max_batch_tokens,
            max_queue=1 << 30,
        )
        self._count = 0

    def read(self, readings: Many[Reading]) -> list[Outcome]:
        """All outcomes, in order; NestedError if the model fails on one."""
        with flushed_denormals():
            return self._run([self._sequence(reading) for reading in readings])

    def _sequence(self, reading: Reading) -> Sequence:
        self._count += 1
        params = SamplingParams(
            max_tokens=reading.answer, temperature=0.0, prompt_logprobs=0 if reading.score else None
        )
        position, state = (reading.memory.position, reading.memory.state) if reading.memory else (0, None)
        return Sequence(
            str(self._count), list(reading.tokens), params, position=position, state=state, keep_state=reading.keep
        )

    def _run(self, sequences: list[Sequence]) -> list[Outcome]:
        outcomes: dict[str, Outcome] = {}
        logprobs: dict[str, tuple[TokenLogprobs | None, ...]] = {}
        by_id = {sequence.id: sequence for sequence in sequences}
        for sequence in sequences:
            self._engine.submit(sequence)
        while self._engine.has_work:
            for event in self._engine.step():
                if event.prompt_logprobs is not None:
                    logprobs[event.sequence_id] = event.prompt_logprobs
                if event.finish is None:
                    continue
                if event.error is not None:
                    raise NestedError(f"model {self.loaded.id!r} failed: {event.error}") from event.error
                answer = tuple(by_id[event.sequence_id].output)
                outcomes[event.sequence_id] = Outcome(event.result, logprobs.get(event.sequence_id, ()), answer)
        return [outcomes[sequence.id] for sequence in sequences]
