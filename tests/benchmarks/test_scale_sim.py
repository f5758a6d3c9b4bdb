"""The simulation's arithmetic, against formulas that are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale_sim as sim

STEADY = sim.Machine(rates=((1, 100.0),), prompt_cost=0.0, load=0.0, commit=0.0)
"""As fast with many turns as with one."""


def test_rates_are_interpolated_and_end_flat() -> None:
    machine = sim.Machine(rates=((1, 100.0), (5, 300.0)))
    assert [machine.rate(turns) for turns in (1, 3, 5, 50)] == [100.0, 200.0, 300.0, 300.0]


def test_zipf_is_a_distribution_with_the_given_ratios() -> None:
    sums = sim.zipf_cumulative(1000, 0.9)
    chances = np.diff(sums, prepend=0.0)
    assert sums[-1] == pytest.approx(1.0)
    assert chances[0] / chances[9] == pytest.approx(10**0.9)


@pytest.mark.parametrize(("users", "exponent", "resident"), [(2000, 0.9, 300), (5000, 0.6, 1000), (500, 1.2, 50)])
def test_hits_are_those_of_ches_approximation(users: int, exponent: float, resident: int) -> None:
    who = np.searchsorted(sim.zipf_cumulative(users, exponent), np.random.default_rng(1).random(60_000))
    found = sim._hits(who, resident)[20_000:].mean()
    assert found == pytest.approx(sim.lru_hit_rate(users, exponent, resident), abs=0.01)
    assert sim.lru_hit_rate(users, exponent, users) == 1.0


def test_the_least_recently_used_session_goes() -> None:
    assert sim._hits(np.array([0, 1, 2, 0, 1, 1]), 2).tolist() == [True, True, False, False, False, True]


def test_a_shared_rate_gives_the_mean_of_m_g_1_ps() -> None:
    """Processor sharing: mean time = mean work / rate / (1 - load), whatever the distribution of the work."""
    plan = sim.Plan(users=100, turns_per_day=sim.DAY / 100, peak=0.6, prompt=1.0, reply=100.0, replicas=1, slots=10_000)
    plan = replace(plan, reply=100.0 / math.exp(plan.sigma**2 / 2))  # a mean of 100: one second alone, load 0.6
    assert plan.load(STEADY) == pytest.approx(0.6)
    found = sim.simulate(plan, STEADY, turns=40_000)
    assert found.mean == pytest.approx(1 / (1 - 0.6), rel=0.05)
    assert found.waiting == 0.0


def test_one_slot_gives_the_wait_of_m_g_1() -> None:
    """First come, first served: mean wait = load * work * (1 + cv^2) / 2 / (1 - load) (Pollaczek and Khinchine)."""
    plan = sim.Plan(users=100, turns_per_day=sim.DAY / 100, peak=0.5, prompt=1.0, sigma=0.5, replicas=1, slots=1)
    plan = replace(plan, reply=100.0 / math.exp(plan.sigma**2 / 2))
    found = sim.simulate(plan, STEADY, turns=60_000)
    squared_variation = math.exp(plan.sigma**2) - 1
    assert found.waiting == pytest.approx(0.5 * (1 + squared_variation) / 2 / (1 - 0.5), rel=0.08)


def test_loading_and_committing_take_their_time() -> None:
    plan = sim.Plan(users=100, turns_per_day=0.01, prompt=1.0, replicas=1, resident_bytes=0)
    quick = sim.simulate(plan, STEADY, turns=400)
    slow = sim.simulate(plan, replace(STEADY, load=0.5, commit=0.25), turns=400)
    assert slow.mean - quick.mean == pytest.approx(0.25 + 0.5 * (1 - slow.hit_rate))
    assert slow.loads_per_second == pytest.approx(plan.arrivals * (1 - slow.hit_rate))


def test_every_turn_begins_after_it_came_and_ends_after_it_began() -> None:
    draw = np.random.default_rng(2)
    ready, work = np.cumsum(draw.exponential(0.5, 500)), draw.exponential(100.0, 500)
    began, ended = sim._queue(ready, work, 3, sim.Machine())
    assert (began >= ready).all()
    assert (ended > began).all()
    running = [int(((began <= at) & (ended > at)).sum()) for at in began]
    assert max(running) == 3


def test_replicas_and_shards_are_as_few_as_do() -> None:
    machine, plan = sim.Machine(), sim.Plan(users=100_000)
    few = sim.fewest_replicas(plan, machine)
    assert few.load(machine) <= 0.7 < replace(few, replicas=few.replicas - 1).load(machine)
    memory, busy = sim.redis_shards(plan, machine)
    assert (memory - 1) * plan.redis_bytes < plan.users * 8 * machine.rest_bytes <= memory * plan.redis_bytes
    assert busy == math.ceil(plan.arrivals * machine.redis_seconds * 2)


def test_figures_come_from_what_the_benchmarks_wrote(tmp_path: Path) -> None:
    serving, state_io = tmp_path / "serving.json", tmp_path / "state_io.json"
    row = {"requests_per_second": 2.0, "prompt_tokens_per_second": 100.0, "between_ms_p50": 5.0, "first_ms_p50": 30.0}
    rows = [
        {**row, "memory": memory, "clients": clients, "output_tokens_per_second": 10.0 * clients + memory}
        for memory in (False, True)
        for clients in (4, 1)
    ]
    serving.write_text(json.dumps({"rows": rows}))
    stored = {"state": "full", "load_p50_ms": 4.0, "commit_p50_ms": 6.0, "store_cpu_ms": 2.0}
    rows = [
        {**stored, "store": store, "at_rest": at_rest, "bytes": size}
        for store, at_rest, size in (("sqlite", "exact", 1), ("redis", "exact", 90), ("redis", "bf16", 40))
    ]
    state_io.write_text(json.dumps({"state_bytes": 100, "rows": rows}))
    machine = sim.Machine.measured(serving, state_io)
    assert machine.rates == ((1, 11.0), (4, 41.0))
    assert machine.prompt_cost == pytest.approx((30.0 / 5.0 - 1) / 50)
    assert (machine.load, machine.commit, machine.redis_seconds) == (0.004, 0.006, 0.002)
    assert (machine.state_bytes, machine.rest_bytes, machine.small_bytes) == (100, 90, 40)
