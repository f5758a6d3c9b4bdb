"""Update jobs: the steps of sessions whose chunk is full, run between the steps that read tokens.

A session whose chunk is full reads nothing until its levels have stepped. While other sessions decode, the updates
between two steps may take `share` of the time of a step, but at least one is always run, oldest first, so that nobody
waits for ever; when nobody else decodes there is nothing to protect and a whole batch is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from nested_runtime.engine.job import Job
from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.state.pool import SlotPool

__all__ = ["Updates"]

MAX_BATCH = 16
SMOOTHING = 0.2  # of a new measurement in a running mean


class Updates:
    """Runs update jobs of one model. `share`: time for updates between two steps, in units of a step's time."""

    def __init__(self, model: LanguageModel, pool: SlotPool, share: float) -> None:
        if share < 0:
            raise ConfigError(f"update_share must be 0 or more, got {share}")
        self.model, self.pool, self.share = model, pool, share
        self.step_seconds = 0.0
        self.session_seconds = 0.0
        self.num_steps = self.num_refused = 0
        self.observe: Callable[[str, float], None] = lambda _name, _value: None

    def saw_step(self, seconds: float) -> None:
        """Take note of how long a step that decodes took."""
        self.step_seconds = _mean(self.step_seconds, seconds)

    def choose(self, due: Sequence[Job], *, others_decode: bool) -> list[Job]:
        """The jobs whose levels step now: those that wait longest, as many as fit the time."""
        ordered = sorted(due, key=lambda job: job.due_since)
        place = self._clock(ordered[0])
        batch = [job for job in ordered if self._clock(job) == place][:MAX_BATCH]
        if not others_decode or not self.session_seconds:
            return batch
        return batch[: max(1, int(self.share * self.step_seconds / self.session_seconds))]

    def run(self, jobs: Sequence[Job]) -> None:
        """Step the levels of `jobs`, which stand at one place of the model's clock. Raises what the model raises."""
        began = perf_counter()
        slots = torch.tensor([job.sequence.slot for job in jobs])
        tokens = torch.tensor([job.next_tokens(1)[0] for job in jobs])
        device = next(iter(self.pool.tensors.values())).device
        places = torch.tensor([job.place for job in jobs], device=device)
        kv = self.pool.extend(slots.tolist(), [0] * len(jobs))
        stepped = self.model.update(slots.to(device), tokens.to(device), places, self.pool.tensors, kv)
        took, norms = stepped.good.tolist(), stepped.norms.tolist()
        for job, good in zip(jobs, took, strict=True):
            job.filled = 0
            job.updates += good
            job.refused += not good
        self.num_steps += sum(took)
        self.num_refused += len(took) - sum(took)
        seconds = perf_counter() - began
        self.session_seconds = _mean(self.session_seconds, seconds / len(jobs))
        self.observe("update_seconds", seconds)
        for norm in (norm for of_session in norms for norm in of_session if norm):
            self.observe("update_norm", norm)

    def _clock(self, job: Job) -> int:
        return job.place % self.model.period if self.model.period else job.place


def _mean(before: float, new: float) -> float:
    return before + SMOOTHING * (new - before) if before else new
