"""The scheduling policy: who reads how many tokens in the next step.

Decode first: every running sequence that has read its prompt reads its one sampled token. Then prefill, round-robin in
quanta that end at multiples of the quantum in the session's own token count, under what the decodes left of the token
budget, but always at least one quantum so that long prompts move on. Admission is first come, first served.
A sequence whose levels are due to step waits for it; no read passes the end of a chunk of its levels.
State has a fixed size, so a running sequence never has to give way to another.
"""

from __future__ import annotations

from collections import deque

from nested_runtime.engine.job import Job
from nested_runtime.errors import ConfigError, Overloaded

__all__ = ["Scheduler"]


class Scheduler:
    """Waiting and running jobs. `quantum`: tokens of a prefill turn; `max_batch_tokens`: tokens of a step."""

    def __init__(self, *, max_batch_tokens: int = 512, max_queue: int = 256, quantum: int = 64) -> None:
        if quantum < 1 or max_batch_tokens < quantum:
            raise ConfigError(f"max_batch_tokens {max_batch_tokens} must be at least the quantum {quantum} (>= 1)")
        self.max_batch_tokens = max_batch_tokens
        self.max_queue = max_queue
        self.quantum = quantum
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._prefilling: deque[Job] = deque()  # in the order of their next turn

    def add(self, job: Job, *, num_free: int) -> None:
        """Queue a job while `num_free` slots are free; Overloaded when the queue is full."""
        if len(self.waiting) >= self.max_queue + num_free:
            raise Overloaded(f"the queue is full ({self.max_queue} sequences wait); retry later")
        self.waiting.append(job)

    def add_first(self, job: Job) -> None:
        """Put a job at the head of the queue: a fork, whose turn came with its leader's."""
        self.waiting.appendleft(job)

    def admit(self) -> Job:
        """Move the job that waits longest to running; the caller gives it a slot."""
        job = self.waiting.popleft()
        self.running.append(job)
        self._prefilling.append(job)
        return job

    def remove(self, job: Job) -> None:
        """Forget a job, wherever it is."""
        for place in (self.waiting, self.running, self._prefilling):
            if job in place:
                place.remove(job)

    def plan(self) -> list[tuple[Job, int]]:
        """The next step: (job, tokens to read), decodes first, every job at most once; who waits for an update, not."""
        decodes = [(job, 1) for job in self.running if not job.is_prefilling and not job.is_due]
        left = (self.max_batch_tokens - len(decodes)) // self.quantum * self.quantum
        return decodes + self._plan_prefill(max(left, self.quantum))

    def _plan_prefill(self, budget: int) -> list[tuple[Job, int]]:
        if not self._prefilling:
            return []
        turns = deque(job for job in self._prefilling if job.is_prefilling and not job.is_due)
        due = deque(job for job in self._prefilling if job.is_prefilling and job.is_due)
        grants = dict.fromkeys(turns, 0)
        served: list[Job] = []
        while turns:
            job = turns[0]
            to_boundary = self.quantum - (job.place + grants[job]) % self.quantum
            take = min(to_boundary, job.room - grants[job])
            if take > budget:
                break
            grants[job] += take
            budget -= take
            turns.popleft()
            (turns if grants[job] < job.room else served).append(job)
        self._prefilling = due + turns + deque(served)
        return [(job, count) for job, count in grants.items() if count]
