"""Scheduler: decode first, budget, cuts, fairness, admission. No model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.job import Job
from nested_runtime.engine.scheduler import Scheduler
from nested_runtime.errors import ConfigError, Overloaded
from nested_runtime.sampling import Chooser


def make_job(name: str, length: int, position: int = 0) -> Job:
    params = SamplingParams(max_tokens=1000, temperature=0.0)
    return Job(Sequence(name, [1] * length, params, position=position), Chooser(params), None)


def admitted(scheduler: Scheduler, *jobs: Job) -> None:
    for job in jobs:
        scheduler.add(job, num_free=len(jobs))
        scheduler.admit()


def advance(plan: list[tuple[Job, int]]) -> dict[str, int]:
    """Do what the plan says, as the engine would."""
    for job, count in plan:
        job.sequence.num_done += count
        while job.cuts and job.cuts[0] <= job.sequence.num_done:
            del job.cuts[0]
        if not job.is_prefilling:
            job.sequence.output.append(1)
    return {job.sequence.id: count for job, count in plan}


def test_decodes_come_first_and_prefill_fills_the_budget() -> None:
    scheduler = Scheduler(max_batch_tokens=64, quantum=16)
    admitted(scheduler, make_job("d", 1))
    assert advance(scheduler.plan()) == {"d": 1}
    admitted(scheduler, make_job("p", 1000))
    plan = scheduler.plan()
    assert [(job.sequence.id, count) for job, count in plan] == [("d", 1), ("p", 48)]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = Scheduler(max_batch_tokens=64, quantum=16)
    admitted(scheduler, make_job("long", 10_000), make_job("short", 40))
    steps = 0
    short = scheduler.running[1]
    while short.is_prefilling:
        advance(scheduler.plan())
        steps += 1
    assert steps == 2


def test_equal_prompts_share_steps_equally() -> None:
    scheduler = Scheduler(max_batch_tokens=48, quantum=16)
    jobs = [make_job(str(i), 2000) for i in range(5)]
    admitted(scheduler, *jobs)
    for _ in range(50):
        advance(scheduler.plan())
        done = [job.sequence.num_done for job in jobs]
        assert max(done) - min(done) <= 16


def test_prefill_goes_on_under_many_decodes() -> None:
    scheduler = Scheduler(max_batch_tokens=16, quantum=16)
    admitted(scheduler, *(make_job(f"d{i}", 1) for i in range(40)))
    for _ in range(3):
        advance(scheduler.plan())
    while any(job.is_prefilling for job in scheduler.running):
        advance(scheduler.plan())
    admitted(scheduler, make_job("p", 100))
    assert advance(scheduler.plan())["p"] == 16


def test_quanta_end_at_multiples_of_the_session_position() -> None:
    scheduler = Scheduler(max_batch_tokens=32, quantum=16)
    job = make_job("p", 100, position=5)
    admitted(scheduler, job)
    advance(scheduler.plan())
    assert job.place == 32


def test_cuts_stop_a_prefill() -> None:
    scheduler = Scheduler(max_batch_tokens=512, quantum=64)
    job = make_job("p", 300)
    for cut in (100, 299, 100, 0, 300, 400):
        job.add_cut(cut)
    admitted(scheduler, job)
    assert [advance(scheduler.plan())["p"] for _ in range(4)] == [100, 199, 1, 1]


def test_admission_is_first_come_and_the_queue_is_bounded() -> None:
    scheduler = Scheduler(max_queue=2)
    for name in "abc":
        scheduler.add(make_job(name, 1), num_free=1)
    with pytest.raises(Overloaded, match="2 sequences wait"):
        scheduler.add(make_job("d", 1), num_free=1)
    scheduler.add_first(make_job("fork", 1))
    assert [scheduler.admit().sequence.id for _ in range(4)] == ["fork", "a", "b", "c"]


def test_impossible_budgets() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens 8 must be at least the quantum 16"):
        Scheduler(max_batch_tokens=8, quantum=16)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(1, 64),
    st.integers(0, 100),
)
def test_every_plan_is_legal_and_everyone_gets_on(prompts: list[tuple[int, int]], quantum: int, extra: int) -> None:
    scheduler = Scheduler(max_batch_tokens=quantum + extra, quantum=quantum)
    jobs = [make_job(str(i), length, position) for i, (length, position) in enumerate(prompts)]
    admitted(scheduler, *jobs)
    longest = max(length for length, _ in prompts)
    for _ in range(len(jobs) * (longest // quantum + 2)):
        plan = scheduler.plan()
        decodes = [job for job, _ in plan if not job.is_prefilling]
        assert plan[: len(decodes)] == [(job, 1) for job in jobs if not job.is_prefilling]
        assert len({id(job) for job, _ in plan}) == len(plan)
        assert all(1 <= count <= job.room for job, count in plan)
        num_prefill = sum(count for job, count in plan if job.is_prefilling)
        assert num_prefill <= max(quantum, quantum + extra - len(decodes))
        advance(plan)
    assert not any(job.is_prefilling for job in jobs)
