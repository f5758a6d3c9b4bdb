"""HTTP serving over the bare engine: tokens/s of 16 streaming clients, and of the engine with the same work.

    OMP_NUM_THREADS=1 python -m benchmarks.over_http [--clients 16] [--seconds 8] [--rounds 3]

Starts `nested-serve` with the shipped model on a free port of this machine. Rounds take turns: clients over HTTP
without a session (nothing is stored), over HTTP with one (a load and a commit a turn), then the engine alone in this
process, as many sequences in flight, prompts and lengths the same. Wall time: client and server share the machine's
cores, the engine has one. Writes build/bench/over_http.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from benchmarks.gate import check_engine
from benchmarks.serving import TEXT, Load, measure
from benchmarks.systems.ours import hope
from nested_runtime.core import SamplingParams
from nested_runtime.core import Sequence as Asked
from nested_runtime.engine.engine import Engine
from nested_runtime.models.loading import LoadedModel, load

OUTPUT = Path(__file__).parents[1] / "build" / "bench" / "over_http.json"
MODEL = "hope-nano"
TOKENS = 64  # of a reply
PROMPT_CHARS = 200
START_SECONDS = 120


@contextmanager
def served() -> Iterator[str]:
    """A server's address, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "server", "--port", str(port), "--data-dir", folder, "--no-web"]
        process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    sys.exit(f"the server did not answer on {url} within {START_SECONDS} s (exit status {process.poll()})")


def bare(loaded: LoadedModel, clients: int, seconds: float) -> float:
    """Output tokens/s of the engine with `clients` sequences in flight."""
    engine = Engine(loaded.model, capacity=clients, end_tokens=(loaded.tokenizer.end_id,))
    params = SamplingParams(max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, temperature=0.0)
    number = done = 0

    def submit() -> None:
        nonlocal number
        number += 1
        text = f"{number}. {TEXT * (PROMPT_CHARS // len(TEXT) + 1)}"[:PROMPT_CHARS]
        prompt = loaded.tokenizer.render([{"role": "user", "content": text}])
        engine.submit(Asked(str(number), list(prompt), params, keep_state=True))

    for _ in range(clients):
        submit()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.finish is not None:
                done += TOKENS
                submit()
    return done / (time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8.0, help="of every measurement")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    check_engine(hope())
    loaded = load(MODEL)
    bare(loaded, args.clients, 1.0)  # warm
    found: dict[str, list[float]] = {"http": [], "http with sessions": [], "engine": []}
    with served() as url:
        asked = Load(url, "", MODEL, PROMPT_CHARS, TOKENS, args.seconds)
        for _ in range(args.rounds):
            for name, memory in (("http", False), ("http with sessions", True)):
                result = asyncio.run(measure(asked, args.clients, memory=memory))
                found[name].append(result.output_tokens_per_second)
            found["engine"].append(bare(loaded, args.clients, args.seconds))
    engine = statistics.median(found["engine"])
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    rows = [{"system": n, "tokens_per_s": rate, "ratio_to_engine": rate / engine} for n, rate in medians.items()]
    for row in rows:
        print(f"{row['system']:20}{row['tokens_per_s']:10.0f} tokens/s{row['ratio_to_engine']:8.2f}")
    print(f"load average {os.getloadavg()[0]:.1f}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
