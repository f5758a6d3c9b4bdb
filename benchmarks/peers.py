"""Ours, learning on, beside a Llama of the same size and other people's memories: tokens/s and ratio to the Llama.

    make bench-peers           # installs benchmarks/peers.txt into build/peers, then
    PYTHONPATH=build/peers OMP_NUM_THREADS=1 python -m benchmarks.peers [--case decode_1 ...] [--rounds 7]

All in one process on one thread, the systems taking turns within every round, so that a busy machine disturbs all
alike; time is CPU time of the process; medians. A system that is not installed is left out, visibly. Writes
build/bench/peers.json, a list of {case, system, tokens_per_s, ratio_to_llama}, and a plot, peers.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import check_engine, check_int8
from benchmarks.plot import bars
from benchmarks.systems.base import Case, System
from benchmarks.systems.ours import hope

OUTPUT = Path(__file__).parents[1] / "build" / "bench"
CASES = (
    Case("prefill", 1, 0),
    Case("decode_1", 1, 512),
    Case("decode_16", 16, 512),
    Case("decode_16_4k", 16, 4096),
    Case("decode_16_16k", 16, 16384),
)
SYSTEMS = ("ours:NestedRuntime", "ours:Exact", "llama:Llama", "nested_learning:NestedLearning",
           "titans_pytorch:TitansPytorch", "ttt_linear:TTTLinear")  # fmt: skip
LLAMA = "hf-llama"
SECONDS = 0.1  # of one measurement, where a step is shorter
MOST_STEPS = 24  # a Llama's cache has room for so many in every round
Step = Callable[[], None]


def systems() -> list[System]:
    """Those that are installed."""
    found: list[System] = []
    for place in SYSTEMS:
        module, name = place.split(":")
        try:
            found.append(getattr(import_module(f"benchmarks.systems.{module}"), name)())
        except ImportError as error:
            print(f"{name} is left out: {error}; make bench-peers installs it", file=sys.stderr)
    return found


def seconds_of(step: Step, count: int) -> float:
    """CPU seconds of one step."""
    begin = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - begin) / count


def measure(case: Case, found: list[System], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a step by system."""
    steps = {system.name: step for system in found if (step := system.prepare(case)) is not None}
    warm = {name: seconds_of(step, 1) for name, step in steps.items()}
    counts = {name: max(1, min(MOST_STEPS, int(SECONDS / max(warm[name], 1e-5)))) for name in steps}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            if number < 3 or warm[name] < 1:  # a slow one changes little from round to round
                taken[name].append(seconds_of(step, counts[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def row(case: Case, system: str, seconds: dict[str, float]) -> dict[str, Any]:
    rate = case.num_tokens / seconds[system]
    ratio = seconds[LLAMA] / seconds[system] if LLAMA in seconds else None
    return {"case": case.name, "system": system, "tokens_per_s": rate, "ratio_to_llama": ratio}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    check_engine(hope())
    check_int8(hope())
    found = systems()
    for system in found:
        print(f"{system.name:18}{system.num_parameters / 1e6:6.2f}M parameters")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        seconds = measure(case, found, args.rounds)
        for name in seconds:
            one = row(case, name, seconds)
            rows.append(one)
            print(f"{case.name:16}{name:18}{one['tokens_per_s']:10.0f} tokens/s{one['ratio_to_llama'] or 0:9.3f}")
        print(f"{'':16}load average {os.getloadavg()[0]:.1f}", flush=True)
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / "peers.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (OUTPUT / "peers.svg").write_text(bars(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
