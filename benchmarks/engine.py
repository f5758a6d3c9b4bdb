"""The engine around its kernels: overhead, cost against history, second turns, shared prompts, state bytes.

    OMP_NUM_THREADS=1 python -m benchmarks.engine [--short]

Correctness first (benchmarks/gate.py): the path that is timed ends in the reference's states and says its tokens. Times
are CPU time of this process, medians; ratios within one run. Writes build/bench/engine.json.

    outside      share of a step's time that is not in the compiled kernels and products
    flatness     time of a decode step after 512 tokens and after a long history, interleaved
    second_turn  time to the first token of a warm session beyond reading its prompt, resident and from stored bytes
    shared       time to the first token of a second session behind a shared prompt of 2,000 tokens, over the first's
    regenerated  the same for a question of 512 tokens asked again, and what keeping the state after it costs
    state        bytes of one session of the shipped model: live, stored exactly, stored in bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import check_engine
from benchmarks.systems.base import VOCAB, Case, tokens
from benchmarks.systems.ours import hope, start
from nested_runtime.core import SamplingParams, TurnResult
from nested_runtime.core import Sequence as Asked
from nested_runtime.engine.engine import Engine
from nested_runtime.kernels.native.stack import Linear, Stack
from nested_runtime.models.hope import Hope
from nested_runtime.models.loading import load
from nested_runtime.state.codec import decode, encode
from nested_runtime.state.snapshot import Binding, Snapshot

OUTPUT = Path(__file__).parents[1] / "build" / "bench" / "engine.json"
BINDING = Binding("tenant", "session", 1)


@contextmanager
def timed_kernels(spent: list[float]) -> Any:
    """Add to spent[0] the seconds in compiled code."""
    kept = {kind: kind.__call__ for kind in (Stack, Linear)}

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.process_time()
            out = inner(*args)
            spent[0] += time.process_time() - begin
            return out

        return timed

    try:
        for kind, inner in kept.items():
            kind.__call__ = wrap(inner)  # type: ignore[method-assign]  # until the block ends
        yield
    finally:
        for kind, inner in kept.items():
            kind.__call__ = inner  # type: ignore[method-assign]  # as it was


def seconds(step: Callable[[], Any], count: int = 1) -> float:
    begin = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - begin) / count


def outside(model: Hope, sessions: int, rounds: int) -> dict[str, Any]:
    """Share of decode steps outside the kernels."""
    engine = Engine(model, capacity=sessions)
    start(engine, Case("outside", sessions, 512))
    shares = []
    for _ in range(rounds):
        spent = [0.0]
        with timed_kernels(spent):
            whole = seconds(engine.step, 16) * 16
        shares.append(1 - spent[0] / whole)
    return {"case": f"decode_{sessions}", "measure": "share outside kernels", "value": statistics.median(shares)}


def flatness(model: Hope, contexts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Decode time of one session by history, over that of the shortest."""
    engines = {}
    for context in contexts:
        engines[context] = Engine(model, capacity=1)
        start(engines[context], Case("flat", 1, context))
    taken: dict[int, list[float]] = {context: [] for context in contexts}
    for _ in range(rounds):
        for context, engine in engines.items():
            taken[context].append(seconds(engine.step, 32))  # a whole chunk: one fold in each
    base = statistics.median(taken[contexts[0]])
    return [
        {"case": f"context_{c}", "measure": "decode time over 512 tokens", "value": statistics.median(taken[c]) / base}
        for c in contexts
    ]


def first_token(engine: Engine, sequence: Asked) -> tuple[float, TurnResult | None]:
    """CPU seconds from submission to the first token, and the result of the turn."""
    begin, took, result = time.process_time(), 0.0, None
    engine.submit(sequence)
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            took = took or time.process_time() - begin
            result = event.result or result
    return took, result


def second_turn(model: Hope, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds to a warm session's first token beyond those of reading the same tokens in a slot."""
    engine, params = Engine(model, capacity=2), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    _, first = first_token(engine, Asked("first", tokens(1, 320)[0].tolist(), params, keep_state=True))
    if first is None:
        raise RuntimeError("the first turn gave no state")
    snapshot = Snapshot.take(first.state, fingerprint="f", binding=BINDING, position=first.position, pending=None)
    blob, prompt = encode(snapshot), tokens(1, 33)[0].tolist()
    beyond: dict[str, list[float]] = {"resident": [], "stored": []}
    for number in range(rounds):
        plain, _ = first_token(engine, Asked(f"p{number}", prompt, params, position=first.position))
        took, _ = first_token(engine, Asked(f"r{number}", prompt, params, position=first.position, state=first.state))
        beyond["resident"].append(took - plain)
        begin = time.process_time()
        state: Mapping[str, torch.Tensor] = decode(blob, engine.specs, "f", BINDING).tensors
        decoding = time.process_time() - begin
        took, _ = first_token(engine, Asked(f"s{number}", prompt, params, position=first.position, state=state))
        beyond["stored"].append(took + decoding - plain)
    return [
        {"case": f"second_turn_{name}", "measure": "ms beyond the prefill", "value": statistics.median(times) * 1e3}
        for name, times in beyond.items()
    ]


def shared(model: Hope, rounds: int) -> dict[str, Any]:
    """Time to first token of the second session behind 2,000 shared tokens, over the first's; without marks."""
    ratios = []
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for number in range(rounds):
        engine = Engine(model, capacity=2, prefix_cache_bytes=1 << 28)
        head = tokens(1, 2000)[0].tolist()
        took = []
        for user in range(2):
            own = tokens(1, 20)[0].tolist()
            asked = Asked(f"{number}-{user}", [*head, *own], params, cache_key=("tenant", "model"))
            took.append(first_token(engine, asked)[0])
        ratios.append(took[1] / took[0])
    return {"case": "shared_prompt_2000", "measure": "second over first TTFT", "value": statistics.median(ratios)}


def regenerated(model: Hope, rounds: int) -> list[dict[str, Any]]:
    """A question of 512 tokens from one version: what keeping the state after it costs, and asking it again."""
    engine = Engine(model, capacity=2, prefix_cache_bytes=1 << 26)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    keeping, again = [], []
    for number in range(rounds):
        prompt = tokens(1, 512)[0].tolist()
        plain, _ = first_token(engine, Asked(f"p{number}", prompt, params))
        kept, found = (
            first_token(engine, Asked(f"{name}{number}", prompt, params, cache_own=("tenant", "session", "digest")))[0]
            for name in "kf"
        )
        keeping.append((kept - plain) * 1e3)
        again.append(found / plain)
    return [
        {"case": "regenerated_512", "measure": "TTFT over that of the first", "value": statistics.median(again)},
        {"case": "keeping_a_question", "measure": "ms beyond the prefill", "value": statistics.median(keeping)},
    ]


def state_bytes() -> list[dict[str, Any]]:
    """Bytes of a session of hope-nano in the middle of a chunk."""
    model = load("hope-nano").model
    engine = Engine(model, capacity=1)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    text = torch.randint(model.vocab_size, (271,)).tolist()
    _, result = first_token(engine, Asked("s", text, params, keep_state=True))
    if result is None:
        raise RuntimeError("the turn gave no state")
    rows = [("live", sum(spec.num_bytes for spec in engine.specs))]
    for at_rest in ("exact", "bf16"):
        snapshot = Snapshot.take(
            result.state, fingerprint="f", binding=BINDING, position=result.position, pending=None, at_rest=at_rest
        )
        rows.append((at_rest, len(encode(snapshot))))
    return [{"case": f"state_{name}", "measure": "bytes", "value": value} for name, value in rows]


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds, histories up to 4,096 tokens")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model, rounds = hope(), 3 if args.short else 9
    if model.vocab_size != VOCAB:
        raise RuntimeError("the compared sizes disagree")
    check_engine(model)
    rows = state_bytes()
    rows += [outside(model, sessions, rounds) for sessions in (1, 16)]
    rows += second_turn(model, 2 * rounds)
    rows.append(shared(model, max(2, rounds // 2)))
    rows += regenerated(model, 4 * rounds)
    rows += flatness(model, (512, 4096) if args.short else (512, 4096, 16384, 65536), rounds)
    for row in rows:
        print(f"{row['case']:24}{row['measure']:32}{row['value']:14.3f}")
    print(f"load average {os.getloadavg()[0]:.1f}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
