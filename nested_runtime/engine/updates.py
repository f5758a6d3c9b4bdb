"""Update jobs: the gradients and steps of levels, run between the steps that read tokens.

A session whose chunk is full reads nothing until its levels have stepped. The work of that is spread: the gradient of a
chunk is summed from the pieces the model names, each computed as soon as its tokens are read and there is time, so that
at the chunk's end only the last small piece is left. Pieces are fixed places of a chunk and are added in their order:
when they are computed changes nothing in the result.

While other sessions decode, the work between two steps may take `share` of the time of a step. Sessions that wait come
first, oldest first, and something of theirs is always run, so that nobody waits for ever; when nobody else decodes
there is nothing to protect. Then follow the pieces of those that decode, the one nearest to its chunk's end first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from nested_runtime.core import KVRows
from nested_runtime.engine.job import Job
from nested_runtime.errors import ConfigError
from nested_runtime.models.adaptation import Stepped
from nested_runtime.models.base import LanguageModel
from nested_runtime.state.pool import SlotPool

__all__ = ["Updates"]

MAX_BATCH = 16
SMOOTHING = 0.2  # of a new measurement in a running mean
FADING = 0.05  # of what earlier calls weigh, with every call
Failure = tuple[Job, Exception]


class Updates:
    """Runs update jobs of one model. `share`: time for updates between two steps, in units of a step's time."""

    def __init__(self, model: LanguageModel, pool: SlotPool, share: float) -> None:
        if not 0 <= share < math.inf:
            raise ConfigError(f"update_share must be a number, 0 or more, got {share}")
        self.model, self.pool, self.share = model, pool, share
        self.observe: Callable[[str, float], None] = lambda _name, _value: None
        self.forget_figures()

    def forget_figures(self) -> None:
        """Count and measure anew: a warm-up is slower than what follows."""
        self.num_steps = self.num_refused = 0
        self.step_seconds = 0.0
        self.step_cost = 0.0  # seconds of a session's step
        self._line = [0.0] * 5  # of tokens x of a call and its seconds y: sums of 1, x, xx, y, xy, the old ones fading

    def saw_step(self, seconds: float) -> None:
        """Take note of how long a step that decodes took."""
        self.step_seconds = _mean(self.step_seconds, seconds)

    def run(self, live: Sequence[Job]) -> list[Failure]:
        """Work for the running jobs that go on; what failed, and why."""
        failures: list[Failure] = []
        decoding = any(not job.is_prefilling and not job.is_due for job in live)
        allowed = self.share * self.step_seconds
        spent = 0.0
        due = sorted((job for job in live if job.is_due), key=lambda job: job.due_since)
        while due and (not decoding or not spent or spent < allowed):
            spent += self._run(self._batch(due, allowed - spent if decoding else math.inf), failures)
            due = [job for job in due if job.is_due and not any(job is failed for failed, _ in failures)]
        early = sorted((job for job in live if self._can_study(job)), key=lambda job: job.chunk - job.filled)
        while early and allowed and spent + self._cost(early[0], 1) <= allowed:
            spent += self._run(self._batch(early, allowed - spent), failures)
            early = [job for job in early if self._can_study(job) and not any(job is failed for failed, _ in failures)]
        if early and allowed and not spent:  # an estimate that keeps all work away is doubted more and more
            self._line[3:] = [0.9 * term for term in self._line[3:]]
        return failures

    def _can_study(self, job: Job) -> bool:
        """Whether a piece of a chunk that is not full waits to be computed."""
        return len(self.model.pieces) > 1 and not job.is_due and self._next(job) <= job.filled

    def _next(self, job: Job) -> int:
        """End of the next piece of a job; 0 = none is left but the step."""
        return next((end for end in self.model.pieces if end > job.studied), 0)

    def _batch(self, jobs: Sequence[Job], seconds: float) -> list[Job]:
        """The first job and those with the same work, as many as fit the time; at least one."""
        kind = self._kind(jobs[0])
        batch = [job for job in jobs if self._kind(job) == kind][:MAX_BATCH]
        if math.isinf(seconds):
            return batch
        if not self._line[0]:
            return batch[:1]  # one shows what it costs
        return [job for n, job in enumerate(batch) if not n or self._cost(jobs[0], n + 1) <= seconds]

    def _cost(self, job: Job, sessions: int) -> float:
        """Seconds of a call for the next piece of so many sessions, and for their step where it follows at once."""
        end = self._next(job)
        step = sessions * self.step_cost if end in (0, self.model.update_chunk) else 0.0
        return self._call_cost(sessions * (end - job.studied)) + step if end else step

    def _call_cost(self, tokens: int) -> float:
        """Seconds of a call for so many tokens: a fixed part and one per token, fitted to the calls so far."""
        one, x, xx, y, xy = self._line
        spread = one * xx - x * x
        if spread <= 1e-9 * one * xx:  # calls of one size so far, or none
            return y / x * tokens if x else 0.0
        slope = max(0.0, (one * xy - x * y) / spread)
        return max(0.0, (y - slope * x) / one) + slope * tokens

    def _saw_call(self, tokens: int, seconds: float) -> None:
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._line = [(1 - FADING) * old + term for old, term in zip(self._line, new, strict=True)]

    def _kind(self, job: Job) -> tuple[int, int]:
        """Jobs of one kind may be batched. A whole chunk is read again where it stands, modulo the model's period."""
        if len(self.model.pieces) > 1:
            return self._next(job), 0
        return 0, job.place % self.model.period if self.model.period else job.place

    def _run(self, jobs: Sequence[Job], failures: list[Failure]) -> float:
        """The next piece of `jobs`, and their step if it was the last; the seconds it took."""
        began = perf_counter()
        try:
            if len(self.model.pieces) > 1 and self._next(jobs[0]):
                self._study(jobs)
            if jobs[0].is_due and (len(self.model.pieces) == 1 or not self._next(jobs[0])):
                self._step(jobs)
        except Exception as error:  # noqa: BLE001 - what the model left in these slots is not known: their turns fail
            failures += [(job, error) for job in jobs]
        return perf_counter() - began

    def _study(self, jobs: Sequence[Job]) -> None:
        """Add the gradient of the next piece of `jobs`."""
        began, begin, end = perf_counter(), jobs[0].studied, self._next(jobs[0])
        slots = self._tensor([job.sequence.slot for job in jobs])
        upcoming = self._tensor([job.next_tokens(1)[0] for job in jobs])
        known = self.pool.tensors["chunk.tokens"][slots, min(end, self.model.update_chunk - 1)]
        is_last = self._tensor([job.filled == end for job in jobs]).bool()
        found = self.model.gradients(slots, begin, end, torch.where(is_last, upcoming, known), self.pool.tensors)
        for row, job in enumerate(jobs):
            own = {name: tensor[row] for name, tensor in found.items()}
            job.gradients = {n: job.gradients[n] + t if begin else t.clone() for n, t in own.items()}
            job.studied = end
        self._saw_call(len(jobs) * (end - begin), perf_counter() - began)

    def _step(self, jobs: Sequence[Job]) -> None:
        """Step the levels of `jobs`. Raises what the model raises."""
        began = perf_counter()
        stepped = self._update(jobs)
        took, norms = stepped.good.tolist(), stepped.norms.tolist()
        for job, good in zip(jobs, took, strict=True):
            job.filled = job.studied = 0
            job.gradients = {}
            job.updates += good
            job.refused += not good
        self.num_steps += sum(took)
        self.num_refused += len(took) - sum(took)
        seconds = perf_counter() - began
        self.step_cost = _mean(self.step_cost, seconds / len(jobs))
        self.observe("update_seconds", seconds)
        for norm in (norm for of_session in norms for norm in of_session if norm):
            self.observe("update_norm", norm)

    def _update(self, jobs: Sequence[Job]) -> Stepped:
        slots = [job.sequence.slot for job in jobs]
        tokens, places = [job.next_tokens(1)[0] for job in jobs], [job.place for job in jobs]
        kv: KVRows | None = self.pool.extend(slots, [0] * len(jobs))
        gradients = None
        if len(self.model.pieces) > 1:
            gradients = {name: torch.stack([job.gradients[name] for job in jobs]) for name in jobs[0].gradients}
        return self.model.update(
            self._tensor(slots), self._tensor(tokens), self._tensor(places), self.pool.tensors, kv, gradients
        )

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.pool.device)


def _mean(before: float, new: float) -> float:
    return before + SMOOTHING * (new - before) if before else new
