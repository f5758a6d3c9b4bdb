"""How many servers so many users need: a simulation from measured figures.

    python -m benchmarks.scale_sim                                    # the tables of docs/scaling.md
    python -m benchmarks.scale_sim --serving build/bench/serving.json --state-io build/bench/state_io.json
    python -m benchmarks.scale_sim --users 50000 --replicas 40 --slots 16 --resident-gib 4

Users are Zipf: user k of N has turns in proportion to k^-s. Arrivals are Poisson. Consistent hashing gives each of R
replicas N/R of the users and 1/R of the turns, so one replica is simulated: a turn whose session is not resident (the
least recently used one goes first) loads it, waits for a slot, is worked on beside the others (the measured rate of n
turns at once, shared equally) and is committed. Tokens of prompts and replies are lognormal. Left out: two turns of one
user at once, which the lease queues; replicas that fail; hot hours of single tenants.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

DAY = 86_400.0
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What one replica and one Redis were measured to do.

    rates         (turns at once, reply tokens a second of them all), ascending: benchmarks/serving.py
    prompt_cost   work of a prompt token, in reply tokens
    load, commit  seconds, store and codec included: benchmarks/state_io.py
    state_bytes   of a session in memory
    rest_bytes    of a version at rest; small_bytes: with --at-rest bf16
    redis_seconds CPU of Redis for a commit and a load

    The defaults are those of docs/log.md, 25 and 26 November 2026: hope-nano, two cores, one replica.
    """

    rates: tuple[tuple[int, float], ...] = ((1, 170.0), (4, 287.0), (16, 553.0), (64, 610.0))
    prompt_cost: float = 0.12
    load: float = 0.005
    commit: float = 0.007
    state_bytes: int = 1_411_072
    rest_bytes: int = 1_179_000
    small_bytes: int = 473_000
    redis_seconds: float = 0.0032

    def rate(self, turns: int) -> float:
        """Reply tokens a second of `turns` at once: linear between what was measured, constant beyond it."""
        counts, speeds = zip(*self.rates, strict=True)
        return float(np.interp(turns, counts, speeds))

    @classmethod
    def measured(cls, serving: Path | None, state_io: Path | None) -> Machine:
        """The figures in files that the benchmarks wrote; what no file says is the default."""
        machine = cls()
        if serving is not None:
            rows = [row for row in json.loads(serving.read_text())["rows"] if row["memory"]]
            rows.sort(key=lambda row: row["clients"])
            alone = rows[0]
            prompt = alone["prompt_tokens_per_second"] / alone["requests_per_second"]
            machine = replace(
                machine,
                rates=tuple((row["clients"], row["output_tokens_per_second"]) for row in rows),
                prompt_cost=max(0.0, alone["first_ms_p50"] / alone["between_ms_p50"] - 1) / prompt,
            )
        if state_io is not None:
            report = json.loads(state_io.read_text())
            full = [row for row in report["rows"] if row["state"] == "full"]
            full.sort(key=lambda row: row["store"])  # Redis before SQLite
            row, small = (next(one for one in full if one["at_rest"] == form) for form in ("exact", "bf16"))
            machine = replace(
                machine,
                load=row["load_p50_ms"] / 1e3,
                commit=row["commit_p50_ms"] / 1e3,
                state_bytes=report["state_bytes"],
                rest_bytes=row["bytes"],
                small_bytes=small["bytes"],
                redis_seconds=row.get("store_cpu_ms", 1e3 * machine.redis_seconds) / 1e3,
            )
        return machine


@dataclass(frozen=True)
class Plan:
    """Who uses it, and what is put there.

    turns_per_day   of a user, on average; `peak` times as many in the busiest hour
    zipf            exponent s
    prompt, reply   median tokens; sigma of their logarithm
    versions        kept of every session
    redis_bytes     of memory one Redis may hold
    """

    users: int = 10_000
    turns_per_day: float = 10.0
    peak: float = 3.0
    zipf: float = 0.9
    prompt: float = 40.0
    reply: float = 60.0
    sigma: float = 0.8
    replicas: int = 4
    slots: int = 16
    resident_bytes: int = 4 * GIB
    versions: int = 8
    redis_bytes: int = 24 * GIB

    @property
    def arrivals(self) -> float:
        """Turns a second at the peak, of all users."""
        return self.users * self.turns_per_day / DAY * self.peak

    def work(self, machine: Machine) -> float:
        """Mean work of a turn in reply tokens: a lognormal's mean is its median times exp(sigma^2 / 2)."""
        return (self.reply + machine.prompt_cost * self.prompt) * math.exp(self.sigma**2 / 2)

    def load(self, machine: Machine) -> float:
        """Share of a replica's best rate that is asked for; over 1 the queue grows without end."""
        return self.arrivals / self.replicas * self.work(machine) / machine.rate(self.slots)


@dataclass(frozen=True)
class Result:
    """Of one replica at the peak; seconds."""

    hit_rate: float
    p50: float
    p99: float
    mean: float
    loads_per_second: float
    waiting: float  # mean seconds for a slot


def zipf_cumulative(users: int, exponent: float) -> np.ndarray[Any, Any]:
    """P(user <= k) for k = 1..users."""
    weights = np.arange(1, users + 1, dtype=np.float64) ** -exponent
    sums = np.cumsum(weights)
    return sums / sums[-1]


def lru_hit_rate(users: int, exponent: float, resident: int) -> float:
    """Che's approximation of LRU: user k is resident with 1 - exp(-p_k T), T such that `resident` are."""
    if resident >= users:
        return 1.0
    chances = np.diff(zipf_cumulative(users, exponent), prepend=0.0)
    low, high = 0.0, 1.0
    while np.sum(-np.expm1(-chances * high)) < resident:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(-np.expm1(-chances * middle)) < resident else (low, middle)
    return float(np.sum(chances * -np.expm1(-chances * high)))


class Sharing:
    """Turns that share a rate equally, the rate depending on how many they are: exact, one heap entry a turn.

    `served` is the work every turn has had that was here all the time; a turn that came at served = v ends at v + work.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ends: list[tuple[float, int]] = []
        self._served, self._now = 0.0, 0.0

    def __len__(self) -> int:
        return len(self._ends)

    def advance(self, now: float) -> None:
        """Work until `now`, which must not be later than `next_end`."""
        if self._ends:
            self._served += (now - self._now) * self._machine.rate(len(self)) / len(self)
        self._now = now

    def next_end(self) -> float:
        """When the first of them ends if nothing else happens."""
        if not self._ends:
            return math.inf
        return self._now + max(0.0, self._ends[0][0] - self._served) * len(self) / self._machine.rate(len(self))

    def add(self, turn: int, work: float) -> None:
        """A turn begins now."""
        heapq.heappush(self._ends, (self._served + work, turn))

    def end(self) -> int:
        """The turn that ends now."""
        return heapq.heappop(self._ends)[1]


def simulate(plan: Plan, machine: Machine, turns: int = 60_000, seed: int = 0) -> Result:
    """One replica of the plan at the peak. The first quarter of the turns only fills it."""
    draw = np.random.default_rng(seed)
    users = max(1, plan.users // plan.replicas)
    arrive = np.cumsum(draw.exponential(plan.replicas / plan.arrivals, turns))
    who = np.searchsorted(zipf_cumulative(users, plan.zipf), draw.random(turns))
    tokens = draw.lognormal(0.0, plan.sigma, (2, turns))
    work = plan.reply * tokens[0] + machine.prompt_cost * plan.prompt * tokens[1]
    hit = _hits(who, max(1, plan.resident_bytes // machine.state_bytes))
    ready = arrive + np.where(hit, 0.0, machine.load)
    began, ended = _queue(ready, work, plan.slots, machine)
    counted = slice(turns // 4, None)
    took = (ended + machine.commit - arrive)[counted]
    return Result(
        hit_rate=float(hit[counted].mean()),
        p50=float(np.quantile(took, 0.5)),
        p99=float(np.quantile(took, 0.99)),
        mean=float(took.mean()),
        loads_per_second=plan.arrivals / plan.replicas * float(1 - hit[counted].mean()),
        waiting=float((began - ready)[counted].mean()),
    )


def _hits(who: np.ndarray[Any, Any], resident: int) -> np.ndarray[Any, Any]:
    """Which turns find their session resident; at first the most active users are."""
    kept: OrderedDict[int, None] = OrderedDict.fromkeys(range(resident - 1, -1, -1))
    hit = np.empty(len(who), bool)
    for number, user in enumerate(who.tolist()):
        hit[number] = user in kept
        if hit[number]:
            kept.move_to_end(user)
        else:
            kept[user] = None
            kept.popitem(last=False)
    return hit


def _queue(ready: Any, work: Any, slots: int, machine: Machine) -> tuple[Any, Any]:
    """When each turn gets a slot and when it ends; first come, first served."""
    began, ended = np.empty(len(ready)), np.empty(len(ready))
    order = np.argsort(ready, kind="stable").tolist()
    running, waiting, at = Sharing(machine), deque[int](), 0
    while at < len(order) or len(running):
        comes = ready[order[at]] if at < len(order) else math.inf
        now = min(comes, running.next_end())
        running.advance(now)
        if now == comes:
            waiting.append(order[at])
            at += 1
        else:
            ended[running.end()] = now
        while waiting and len(running) < slots:
            turn = waiting.popleft()
            began[turn] = now
            running.add(turn, float(work[turn]))
    return began, ended


def fewest_replicas(plan: Plan, machine: Machine, most: float = 0.7) -> Plan:
    """The plan with as few replicas as keep each below `most` of its rate."""
    return replace(plan, replicas=max(1, math.ceil(plan.load(machine) * plan.replicas / most)))


def redis_shards(plan: Plan, machine: Machine) -> tuple[int, int]:
    """(shards that hold all versions, shards that keep up at half of one core)."""
    memory = plan.users * plan.versions * machine.rest_bytes / plan.redis_bytes
    busy = plan.arrivals * machine.redis_seconds / 0.5
    return math.ceil(memory), math.ceil(busy)


def describe(plan: Plan, machine: Machine, turns: int) -> dict[str, str]:
    """A row of the tables."""
    found = simulate(plan, machine, turns)
    memory, busy = redis_shards(plan, machine)
    traffic = plan.arrivals * machine.rest_bytes
    grows = plan.load(machine) >= 1  # then the times say how long was simulated, nothing else
    return {
        "users": f"{plan.users:,}",
        "turns/s": f"{plan.arrivals:,.1f}",
        "replicas": f"{plan.replicas:,}",
        "slots": str(plan.slots),
        "resident": f"{plan.resident_bytes / GIB:g} GiB",
        "busy": f"{plan.load(machine):.0%}",
        "hits": f"{found.hit_rate:.1%}",
        "loads/s": f"{found.loads_per_second * plan.replicas:,.1f}",
        "written": f"{traffic / 1e6:,.0f} MB/s",
        "p50": "grows" if grows else f"{found.p50:.2f} s",
        "p99": "grows" if grows else f"{found.p99:.2f} s",
        "Redis: hold": str(memory),
        "Redis: keep up": str(busy),
    }


def kept(plan: Plan, machine: Machine) -> list[dict[str, str]]:
    """What Redis must hold by how much of it is kept."""
    rows = []
    for at_rest, size in (("exact", machine.rest_bytes), ("bf16", machine.small_bytes)):
        for versions in (8, 2, 1):
            stored = replace(plan, versions=versions)
            shards, _ = redis_shards(stored, replace(machine, rest_bytes=size))
            total = plan.users * versions * size / 1e12
            rows.append({"--at-rest": at_rest, "--retain": str(versions), "TB": f"{total:.2f}", "shards": str(shards)})
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serving", type=Path, help="what benchmarks/serving.py wrote")
    parser.add_argument("--state-io", type=Path, help="what benchmarks/state_io.py wrote")
    parser.add_argument("--turns", type=int, default=60_000, help="turns simulated for a row")
    parser.add_argument("--users", type=int, help="one row of your own")
    parser.add_argument("--replicas", type=int, help="default: as few as are busy for 70 %%")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--resident-gib", type=float, default=4.0)
    parser.add_argument("--zipf", type=float, default=0.9)
    given = parser.parse_args()
    machine = Machine.measured(given.serving, given.state_io)
    plan = Plan(slots=given.slots, resident_bytes=int(given.resident_gib * GIB), zipf=given.zipf)
    if given.users is not None:
        plan = replace(plan, users=given.users)
        plan = replace(plan, replicas=given.replicas) if given.replicas else fewest_replicas(plan, machine)
        print(table([describe(plan, machine, given.turns)]))
        return
    print(f"{machine}\n{plan}\n\nUsers, with as few replicas as are busy for 70 %:\n")
    sizes = [fewest_replicas(replace(plan, users=users), machine) for users in (1_000, 10_000, 100_000, 1_000_000)]
    print(table([describe(one, machine, given.turns) for one in sizes]))
    print(f"\nWhat Redis holds (1,000,000 users, {plan.redis_bytes / GIB:g} GiB a shard):\n")
    print(table(kept(sizes[3], machine)))
    print("\nMemory for idle sessions (100,000 users):\n")
    memory = [replace(sizes[2], resident_bytes=int(gib * GIB)) for gib in (0.25, 1, 4, 16)]
    print(table([describe(one, machine, given.turns) for one in memory]))
    print("\nSlots (100,000 users):\n")
    print(table([describe(replace(sizes[2], slots=slots), machine, given.turns) for slots in (1, 4, 16, 64)]))
    print("\nFewer replicas than needed (100,000 users):\n")
    shares = [replace(sizes[2], replicas=math.ceil(sizes[2].replicas * share)) for share in (1.0, 0.8, 0.7, 0.6)]
    print(table([describe(one, machine, given.turns) for one in shares]))


if __name__ == "__main__":
    main()
