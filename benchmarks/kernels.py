"""Memory kernels on CPU: one HOPE layer's packed step, torch reference against numba and C++, correctness first.

    OMP_NUM_THREADS=1 python -m benchmarks.kernels [--device cuda: benchmarks/gpu.py]

Decode is one token of each of 1, 16, 64 sessions in the middle of a chunk; prefill is 512 tokens of one session. The
systems take turns; time is CPU time of this process (one thread), so that a busy machine disturbs little; medians.
A step is the whole layer (projections, convolution, rule, norm, output); "gemm" is its two dense products alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from benchmarks import gpu
from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.dispatch import KernelConfig, Kernels, choose
from nested_runtime.memory import self_modifying
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.self_modifying import SelfModifying

OUTPUT = Path(__file__).parents[1] / "build" / "bench" / "kernels.json"
DIM, HEADS, HEAD_DIM, CHUNK = 256, 4, 64, 32
TOLERANCE = 1e-4
ROUNDS = 9

Pool = dict[str, torch.Tensor]
Step = Callable[[torch.Tensor, Pool, Batch], torch.Tensor]


class Case(NamedTuple):
    """One step: `tokens` of each of so many sessions, which have read `position` tokens."""

    name: str
    sessions: int
    tokens: int
    position: int
    repeat: int  # steps per measurement

    def batch(self) -> Batch:
        ends = torch.arange(self.sessions + 1, dtype=torch.int32) * self.tokens
        slots = torch.arange(1, self.sessions + 1, dtype=torch.int32)
        positions = torch.full((self.sessions,), self.position)
        return Batch(torch.zeros(self.sessions * self.tokens, dtype=torch.int64), ends, slots, positions)


MIDDLE = CHUNK + CHUNK // 2
CASES = [
    Case("decode_1", 1, 1, MIDDLE, 40),
    Case("decode_16", 16, 1, MIDDLE, 4),
    Case("decode_64", 64, 1, MIDDLE, 1),
    Case("prefill_512", 1, 512, CHUNK, 1),
]


def layer() -> SelfModifying:
    torch.manual_seed(0)
    module = SelfModifying(DIM, HEADS, HEAD_DIM, RuleOptions(CHUNK)).requires_grad_(False)
    module.base += 0.02 * torch.randn_like(module.base)
    return module


def compiled() -> dict[str, Kernels]:
    """What can be built here."""
    found = {}
    for name in ("numba", "native"):
        try:
            found[name] = choose(KernelConfig(name), "cpu", torch.float32)
        except ConfigError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return {name: kernels for name, kernels in found.items() if kernels is not None}


def through(module: SelfModifying, kernels: Kernels) -> Step:
    def step(x: torch.Tensor, pool: Pool, batch: Batch) -> torch.Tensor:
        self_modifying.packed_kernels = lambda *_: kernels  # type: ignore[assignment]  # the kernels to time
        return module.apply_packed(x, pool, batch)

    return step


def systems(module: SelfModifying) -> dict[str, Step]:
    return {
        "reference": lambda x, pool, batch: UpdateRule.apply_packed(module, x, pool, batch),
        **{name: through(module, kernels) for name, kernels in compiled().items()},
        "gemm": lambda x, pool, batch: linear(linear(x, module.w_in)[:, : HEADS * HEAD_DIM], module.w_out),
    }


def inputs(module: SelfModifying, case: Case) -> tuple[torch.Tensor, Pool, Batch]:
    """A random step, and a pool whose sessions have read `case.position` random tokens."""
    pool = {s.name: torch.zeros(case.sessions + 1, *s.shape) for s in module.state()}
    before = case._replace(tokens=case.position, position=0)
    module.apply_packed(torch.randn(case.sessions * before.tokens, DIM), pool, before.batch())
    return torch.randn(case.sessions * case.tokens, DIM), pool, case.batch()


def check(module: SelfModifying, case: Case) -> None:
    """Speed is only reported of a path that is right: output and state of one step against the reference."""
    x, pool, batch = inputs(module, case)
    found = {}
    for name in ("reference", *compiled()):
        copy = {key: tensor.clone() for key, tensor in pool.items()}
        found[name] = {"out": systems(module)[name](x, copy, batch), **copy}
    for name in compiled():
        for key, expected in found["reference"].items():
            error = float((found[name][key] - expected).abs().max() / expected.abs().max().clamp(min=1e-2))
            if error > TOLERANCE:
                sys.exit(f"{case.name}: {key} of {name} is off by {error:.1e}, over {TOLERANCE}; nothing was measured")


def measure(module: SelfModifying, case: Case) -> dict[str, float]:
    """CPU seconds per step by system, median over interleaved rounds."""
    x, pool, batch = inputs(module, case)
    seconds: dict[str, list[float]] = {name: [] for name in systems(module)}
    for _ in range(ROUNDS):
        for name, step in systems(module).items():
            begin = time.process_time()
            for _ in range(case.repeat):  # the same position again: the tail's row is overwritten
                step(x, pool, batch)
            seconds[name].append((time.process_time() - begin) / case.repeat)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    module, rows = layer(), []
    print(f"{'case':14}{'system':12}{'us/step':>10}{'tokens/s':>12}{'ratio':>8}")
    for case in CASES:
        check(module, case)
        seconds = measure(module, case)
        for name, value in seconds.items():
            rate, ratio = case.sessions * case.tokens / value, seconds["reference"] / value
            rows.append({"case": case.name, "system": name, "tokens_per_s": rate, "ratio_to_reference": ratio})
            print(f"{case.name:14}{name:12}{value * 1e6:10.0f}{rate:12.0f}{ratio:8.1f}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    if parser.parse_args().device == "cuda":
        gpu.main()
    else:
        main()
