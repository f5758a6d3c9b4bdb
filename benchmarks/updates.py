"""What learning levels cost those who decode: token-to-token latency of 16 sessions, levels on beside levels off.

    OMP_NUM_THREADS=1 python -m benchmarks.updates

On: hope-nano with the levels of a training config. Off: the same with chunks so long that no step falls into the run,
and no time for their gradients. Plain: hope-nano as it is, whose blocks may have a faster path without levels.
"spread": the sessions stand at places evenly spread over a chunk, as independent users do; "at once": all reach the end
of their chunks in the same step. They take turns, round by round. A latency is the time from a token of a session to
its next one. Time is CPU time of the engine's thread, what an idle core would have taken, so that a busy machine
disturbs little; wall time is shown beside it. "own" latencies hold an update of the session itself, "others" all the
rest: what another's update may cost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import build, load
from nested_runtime.train.start import start_from

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "bench" / "updates.json"
CONFIG = ROOT / "nested_runtime" / "train" / "configs" / "hope-nano-levels.json"
TARGET = 3.0
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}
NEVER = 4096  # tokens of a chunk that no session fills here
WARM = 8  # tokens of every session before the first latency that counts


@dataclass
class Latencies:
    """Seconds by clock; `own`: an update of the session lay in between."""

    own: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    others: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    seconds: float = 0.0

    def all(self, clock: str) -> list[float]:
        return self.own[clock] + self.others[clock]


def prompts(case: str, sessions: int, chunk: int) -> list[list[int]]:
    """Prompts after which the sessions stand spread over a chunk, or at one place of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = [chunk // 2 + (i * chunk // sessions if case == "spread" else 0) for i in range(sessions)]
    return [torch.randint(10, 4000, (length,), generator=generator).tolist() for length in lengths]


def decode(engine: Engine, chunk: int, texts: list[list[int]], length: int, into: Latencies) -> None:
    """Let all sessions decode `length` tokens side by side and note every latency."""
    params = SamplingParams(max_tokens=length + WARM, temperature=0.0, ignore_eos=True)
    last: dict[str, dict[str, float]] = {}
    seen = dict.fromkeys(map(str, range(len(texts))), 0)
    for number, text in enumerate(texts):
        engine.submit(Sequence(str(number), text, params))
    began, counting = 0.0, False
    while engine.has_work:
        events = engine.step()
        now = {name: clock() for name, clock in CLOCKS.items()}
        if not counting and min(seen.values()) >= WARM:
            counting, began = True, now["cpu"]
        for event in (e for e in events if e.token is not None):
            name = event.sequence_id
            seen[name] += 1
            place = len(texts[int(name)]) + seen[name] - 1  # tokens in the state when this one was sampled
            if counting:
                where = into.own if place % chunk == 1 else into.others
                for clock, value in now.items():
                    where[clock].append(value - last[name][clock])
                into.tokens += 1
            last[name] = now
            if event.error is not None:
                raise event.error
        if counting and len(seen) > sum(n < length + WARM for n in seen.values()):
            break  # the first is done: from here on fewer than `sessions` decode
    into.seconds += time.thread_time() - began
    for name in seen:
        engine.abort(name)
    engine.step()


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def row(found: Latencies, base: Latencies | None) -> dict[str, Any]:
    """Milliseconds, and ratios to the row without learning."""
    result: dict[str, Any] = {"tokens_per_s": round(found.tokens / found.seconds, 1), "latencies": found.tokens}
    for clock in CLOCKS:
        for name, values in (("all", found.all(clock)), ("own", found.own[clock]), ("others", found.others[clock])):
            if values:
                figures = {f"p{100 * share:g}": round(1e3 * quantile(values, share), 2) for share in (0.5, 0.99)}
                result[f"{clock}_{name}"] = figures | {"max": round(1e3 * max(values), 2)}
        if base is not None:
            for name, values in (("all", found.all(clock)), ("others", found.others[clock])):
                result[f"{clock}_p99_ratio_{name}"] = round(quantile(values, 0.99) / quantile(base.all(clock), 0.99), 2)
    return result


def models(config: Path) -> tuple[dict[str, LanguageModel], int]:
    """hope-nano without levels, with levels that never step, with levels, and C_1."""
    plain = load("hope-nano")
    fields = json.loads(config.read_text())["model"]
    still = {**fields, "levels": [{**level, "chunk": NEVER} for level in fields["levels"]]}
    off, on = build("hope", still), build("hope", fields)
    for model in (off, on):
        start_from(model, plain)
        model.eval().requires_grad_(False)
    return {"plain": plain.model, "off": off, "on": on}, on.update_chunk


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="training config whose model has levels")
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=160, help="of every session and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.5, help="update_share of the engine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    made, chunk = models(args.config)
    report: dict[str, Any] = {"cpus": os.cpu_count(), "load_average": os.getloadavg()[0], **vars(args)}
    report["config"] = args.config.stem
    for case in ("spread", "at once"):
        texts = prompts(case, args.sessions, chunk)
        found = {name: Latencies() for name in made}
        engines = {
            n: Engine(model, capacity=args.sessions, update_share=args.share if n == "on" else 0.0)
            for n, model in made.items()
        }
        for engine in engines.values():
            engine.submit(Sequence("warm-up", [10] * (chunk + 2), SamplingParams(max_tokens=2, ignore_eos=True)))
            while engine.has_work:
                engine.step()
            engine.updates.forget_figures()
        for _ in range(args.rounds):
            for name, engine in engines.items():
                decode(engine, chunk, texts, args.tokens, found[name])
        report[case] = {n: row(f, found["off"] if n == "on" else None) for n, f in found.items()}
        report[case]["on"]["cpu_p99_ratio_to_plain"] = round(
            quantile(found["on"].all("cpu"), 0.99) / quantile(found["plain"].all("cpu"), 0.99), 2
        )
        report[case]["on"]["updates"] = engines["on"].stats()["updates"]
        print(case)
        for name in found:
            print(f"  {name:5}", json.dumps(report[case][name]))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(report, indent=1))
    worst = max(report[case]["on"]["cpu_p99_ratio_all"] for case in ("spread", "at once"))
    print(f"p99 with learning on is at most {worst} times that with learning off (aim: {TARGET:g})")
    return 0 if worst <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
