"""Engine: sequences in, tokens and states out. Synchronous, one thread, no I/O.

    engine.submit(sequence)
    while engine.has_work:
        for event in engine.step(): ...

A step lets levels learn (`updates.py`), admits, plans, runs one packed forward pass, samples, and ends the sequences
that are done. Whether a sequence stops is decided inside the step, so its final state is a function of its tokens and
never of timing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from time import perf_counter
from typing import Any

import torch

from nested_runtime.core import FinishReason, SamplingParams, Sequence, TokenEvent, TokenLogprobs, TurnResult
from nested_runtime.engine.job import Job
from nested_runtime.engine.prefix import PrefixCache
from nested_runtime.engine.runner import Runner, state_specs
from nested_runtime.engine.scheduler import Scheduler
from nested_runtime.engine.updates import Updates
from nested_runtime.errors import ContextOverflow, RequestError
from nested_runtime.models.base import LanguageModel
from nested_runtime.sampling import Chooser, choose, token_logprobs, validate
from nested_runtime.state.pool import SlotPool, check_state

__all__ = ["Engine"]


class Engine:
    """Runs sequences of one model over `capacity` slots.

    end_tokens          ids that end a reply unless params.ignore_eos
    max_batch_tokens    tokens of one step (see Scheduler); max_queue: sequences that may wait for a slot
    prefix_cache_bytes  host memory for states after prompt prefixes; 0 = off
    kv_bytes            of keys and values of all running sequences; None = enough for every slot at its longest
    update_share        time for updates of levels between two steps, in units of a step's time
    State tensors are what `model.state_spec()` says; a float64 model gets float64 states.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        capacity: int = 16,
        end_tokens: Collection[int] = (),
        max_batch_tokens: int = 512,
        max_queue: int = 256,
        prefix_cache_bytes: int = 0,
        kv_bytes: int | None = None,
        update_share: float = 1.5,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model.eval()
        self.end_tokens = frozenset(end_tokens)
        self.specs = state_specs(model)
        self.pool = SlotPool(self.specs, capacity, device, kv_bytes=kv_bytes, max_step=max_batch_tokens)
        quantum = min(max_batch_tokens, model.chunk * max(1, 64 // model.chunk))
        self.scheduler = Scheduler(max_batch_tokens=max_batch_tokens, max_queue=max_queue, quantum=quantum)
        self.runner = Runner(model, self.pool, max_tokens=max_batch_tokens + capacity, max_sequences=capacity)
        self.updates = Updates(model, self.pool, update_share)
        self.prefixes = PrefixCache(model.chunk, prefix_cache_bytes)
        self._jobs: dict[str, Job] = {}
        self._events: list[TokenEvent] = []
        self._counters = Counter[str]()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return bool(self._jobs or self._events)

    @property
    def max_sequences(self) -> int:
        """Sequences that may be running or waiting at a time."""
        return self.pool.capacity + self.scheduler.max_queue

    def warm_up(self) -> None:
        """Run a prefill, an update if levels adapt, and a decode, uncounted. Raises what they raise."""
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.submit(Sequence("warm-up", [0] * (max(self.model.chunk, self.model.update_chunk) + 1), params))
        while self.has_work:
            for event in self.step():
                if event.error is not None:
                    raise event.error
        self._counters.clear()
        self.updates.forget_figures()

    def forget_prefixes(self, prefix: tuple[str, ...]) -> None:
        """Drop the cached prompt prefixes whose key (cache_key or cache_own) starts with `prefix`."""
        self.prefixes.states.forget(prefix)

    def validate(self, sequence: Sequence) -> None:
        """Raise RequestError or StateError if the sequence cannot run. Safe to call from any thread."""
        validate(sequence.params, self.model.vocab_size)
        if not sequence.prompt:
            raise RequestError("the prompt has no tokens; give at least one", param="prompt")
        for token in (min(sequence.prompt), max(sequence.prompt)):
            if not 0 <= token < self.model.vocab_size:
                raise RequestError(f"token id {token} is not in 0..{self.model.vocab_size - 1}", param="prompt")
        if sequence.num_done or sequence.output:
            raise RequestError(f"sequence {sequence.id!r} has run before; submit a new Sequence", param="id")
        if sequence.position < 0:
            raise RequestError(f"position must be >= 0, got {sequence.position}", param="position")
        if sequence.state is not None:
            check_state(self.specs, sequence.state)
        if not self.pool.can_ever_hold(self._rows(sequence)):
            raise ContextOverflow(
                f"the keys and values of {self._rows(sequence)} tokens do not fit into this server's kv_bytes; "
                "shorten the prompt or max_tokens, or start the server with a larger kv_bytes",
                param="prompt",
            )

    def _rows(self, sequence: Sequence) -> int:
        """Tokens whose keys and values the sequence comes to hold."""
        before = next((len(sequence.state[s.name]) for s in self.specs if s.grows), 0) if sequence.state else 0
        return before + len(sequence.prompt) + sequence.params.max_tokens

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. RequestError: it cannot run, or its id is taken; Overloaded: the queue is full."""
        self.validate(sequence)
        if sequence.id in self._jobs:
            raise RequestError(f"a sequence with id {sequence.id!r} is already running; ids must be unique", param="id")
        job = Job(sequence, Chooser(sequence.params, sequence.prompt, self.end_tokens), sequence.state)
        job.chunk = self.model.update_chunk
        leader = self._jobs.get(sequence.fork_of or "")
        leader = leader.leader or leader if leader is not None else None
        if leader is not None and leader.can_lead(sequence):
            job.follow(leader)
        else:
            self.scheduler.add(job, num_free=self.pool.num_free)
        self._jobs[sequence.id] = job

    def abort(self, sequence_id: str) -> None:
        """Stop a sequence now: its slot is zeroed, no state is returned. Unknown ids are ignored."""
        job = self._jobs.get(sequence_id)
        if job is not None:
            self._end(job, FinishReason.ABORT)

    def finish(self, sequence_id: str) -> None:
        """End a sequence well: no further token is sampled, an unread prompt is still read, the state is returned."""
        job = self._jobs.get(sequence_id)
        if job is not None:
            job.finishing = True

    def step(self) -> list[TokenEvent]:
        """Run one step and return what happened since the last call."""
        for job in [job for job in self.scheduler.running if job.finishing and not job.is_prefilling]:
            self._complete(job, FinishReason.STOP)
        if self.model.update_chunk:
            self._update()
        while self.scheduler.waiting and self.pool.has_room(self._rows(self.scheduler.waiting[0].sequence)):
            self._start(self.scheduler.admit())
        plan = self.scheduler.plan()
        if plan:
            began, decodes = perf_counter(), not plan[0][0].is_prefilling
            self._run(plan)
            if decodes:
                self.updates.saw_step(perf_counter() - began)
        events, self._events = self._events, []
        return events

    def stats(self) -> dict[str, Any]:
        """Gauges and counters."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self._jobs) - len(self.scheduler.running),
            "slots": self.pool.capacity,
            "slots_free": self.pool.num_free,
            "kv_blocks": self.pool.blocks.num_blocks if self.pool.blocks else 0,
            "kv_blocks_free": self.pool.blocks.num_free if self.pool.blocks else 0,
            **{name: self._counters[name] for name in ("steps", "prompt_tokens", "sampled_tokens")},
            "updates": self.updates.num_steps,
            "updates_refused": self.updates.num_refused,
            "prefix_queries": self.prefixes.num_queries,
            "prefix_hits": self.prefixes.num_hits,
            "prefix_hit_tokens": self.prefixes.num_hit_tokens,
            "prefix_bytes": self.prefixes.states.num_bytes,
        }

    def _start(self, job: Job) -> None:
        """Give an admitted job its slot, with the longest known prefix of its prompt in it."""
        sequence = job.sequence
        sequence.slot = self.pool.acquire(self._rows(sequence))
        if not sequence.num_done:
            job.cache_keys = self.prefixes.keys(sequence)
            length, state = self.prefixes.find(job.cache_keys)
            if state is not None:
                sequence.num_done, job.num_cached, job.state = length, length, state
            for point in self.prefixes.points(sequence, job.cache_keys):
                job.add_cut(point)
        if job.state is not None:
            self.pool.load(sequence.slot, job.state)
            if job.chunk:
                job.filled = int(job.state["chunk.count"][0])
            job.state = None
        self._pass_cuts(job)

    def _run(self, plan: list[tuple[Job, int]]) -> None:
        spans = [job.span(num_new) for job, num_new in plan]
        try:
            output = self.runner.step(spans)
        except Exception as error:  # noqa: BLE001 - whatever the model raised, no state of this step can be trusted
            for job, _ in plan:
                self._fail(job, error)
            return
        self._counters["steps"] += 1
        read: list[Job] = []  # have nothing left to read
        sampling: list[Job] = []
        rows: list[int] = []  # of the logits, for `sampling`
        begin = 0
        for index, ((job, num_new), end) in enumerate(zip(plan, output.ends, strict=True)):
            first, begin = begin, end
            if index in output.bad:
                self._fail(job, job.diverged())
                continue
            was_prefilling = job.is_prefilling
            job.advance(num_new, self._counters["steps"])
            if was_prefilling:
                self._counters["prompt_tokens"] += num_new
                self._advance_prompt(job, num_new, output.logits[first:end])
                if not job.sequence.slot or job.is_prefilling:
                    continue
            read.append(job)
            if job.wants_token:
                sampling.append(job)
                rows.append(end - 1)
        self._sample(sampling, _rows(output.logits, rows))
        for job in read:
            if not job.sequence.output:
                self._complete(job, FinishReason.STOP if job.finishing else FinishReason.LENGTH)

    def _update(self) -> None:
        """Let the levels of sessions with a full chunk step, and others prepare theirs, as time allows."""
        live = [job for job in self.scheduler.running if job.is_prefilling or not job.finishing]
        for job, error in self.updates.run(live):
            self._fail(job, error)

    def _advance_prompt(self, job: Job, num_new: int, rows: torch.Tensor) -> None:
        """Bookkeeping after prompt tokens were read: log-probabilities, cuts, the state at the prompt's end."""
        sequence = job.sequence
        if sequence.params.prompt_logprobs is not None:
            first = sequence.num_done - num_new + 1
            targets = sequence.prompt[first : sequence.num_done + 1]
            counts = [sequence.params.prompt_logprobs] * len(targets)
            job.prompt_logprobs += token_logprobs(rows[: len(targets)], targets, counts)
        self._pass_cuts(job)
        if sequence.keep_state_at_prompt and sequence.slot and not job.is_prefilling:
            if self.pool.is_finite(sequence.slot):
                sequence.prompt_result = self._result(job, None)
            else:
                self._fail(job, job.diverged())

    def _pass_cuts(self, job: Job) -> None:
        """Keep the state where it was asked for: in the prefix cache, and for the forks that wait for it."""
        sequence = job.sequence
        is_fork_point = bool(job.followers) and sequence.num_done == len(sequence.prompt) - 1
        is_new_cut = bool(job.cuts) and job.cuts[0] == sequence.num_done
        if not is_new_cut and not is_fork_point:
            return
        if not self.pool.is_finite(sequence.slot):
            self._fail(job, job.diverged())
            return
        state = self.pool.save(sequence.slot)
        if is_new_cut:
            del job.cuts[0]
        if sequence.num_done in job.cache_keys:
            self.prefixes.states.put(job.cache_keys[sequence.num_done], state)
        if is_fork_point:
            for follower in reversed(job.followers):
                follower.unfollow(state)
                self.scheduler.add_first(follower)
            job.followers = []

    def _sample(self, jobs: list[Job], logits: torch.Tensor) -> None:
        """Sample a token for every job from its row of logits [N, V]."""
        if not jobs:
            return
        tokens = choose(logits, [job.chooser for job in jobs])
        logprobs = token_logprobs(logits, tokens, [job.sequence.params.logprobs for job in jobs])
        self._counters["sampled_tokens"] += len(tokens)
        for job, token, logprob in zip(jobs, tokens, logprobs, strict=True):
            job.sequence.output.append(token)
            try:
                reason = self._stop_reason(job, token)
            except Exception as error:  # noqa: BLE001 - the caller's code failed: this sequence's trouble alone
                self._fail(job, error)
                continue
            if reason is None:
                self._emit(job, token=token, logprobs=logprob)
            else:
                self._complete(job, reason, token, logprob)

    def _stop_reason(self, job: Job, token: int) -> FinishReason | None:
        sequence = job.sequence
        params = sequence.params
        stops = sequence.stop_check is not None and sequence.stop_check(token)
        stops = stops or (token in self.end_tokens and not params.ignore_eos) or token in params.stop_token_ids
        if stops and len(sequence.output) >= params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.output) >= params.max_tokens else None

    def _complete(
        self, job: Job, reason: FinishReason, token: int | None = None, logprobs: TokenLogprobs | None = None
    ) -> None:
        """End a job whose reply is whole, with the state it asked to keep."""
        sequence = job.sequence
        result: TurnResult | None = None
        if sequence.keep_state_at_prompt and sequence.prompt_result is not None:
            result = sequence.prompt_result
        elif sequence.keep_state:
            if not self.pool.is_finite(sequence.slot):
                self._fail(job, job.diverged())
                return
            pending = sequence.output[-1] if sequence.output else None
            result = self._result(job, pending)
        self._end(job, reason, token=token, logprobs=logprobs, result=result)

    def _result(self, job: Job, pending: int | None) -> TurnResult:
        """The state of a job as it is now."""
        return TurnResult(self.pool.save(job.sequence.slot), job.place, pending, job.updates, job.refused)

    def _fail(self, job: Job, error: Exception) -> None:
        self._end(job, FinishReason.ERROR, error=error)

    def _end(self, job: Job, reason: FinishReason, **fields: Any) -> None:
        """Take a job out of the engine, zero its slot, hand its forks to the first of them, say so."""
        del self._jobs[job.sequence.id]
        self.scheduler.remove(job)
        if job.sequence.slot:
            self.pool.release(job.sequence.slot)
            job.sequence.slot = 0
        if job.leader is not None:
            job.leader.followers.remove(job)
        if job.followers:
            heir, *others = job.followers
            heir.leader = None
            self.scheduler.add_first(heir)
            for other in others:
                other.follow(heir)
        self._emit(job, finish=reason, num_cached=job.num_cached, **fields)

    def _emit(self, job: Job, **fields: Any) -> None:
        if job.is_silent and job.sequence.params.prompt_logprobs is not None and "error" not in fields:
            fields["prompt_logprobs"] = (None, *job.prompt_logprobs)
        job.is_silent = False
        self._events.append(TokenEvent(job.sequence.id, **fields))


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, without a copy where they are all."""
    return logits if len(rows) == len(logits) else logits[rows]
