"""What keeping a memory costs: commit and load of nano's state on SQLite and on a real Redis, and its bytes at rest.

    python benchmarks/state_io.py [--rounds 200] [--config PATH] [--redis URL]

commit = encode + compress + store; load = read + decompress + decode + verify every checksum. The state is measured
as it is after a text (`read`) and with every element random (`full`, the worst case for compression and size). On a
busy machine look at the cpu columns: the mean work of this process, waiting left out, and that of Redis for both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import torch

from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.models.loading import build
from nested_runtime.state import codec
from nested_runtime.state.snapshot import AT_REST, Binding, Snapshot
from nested_runtime.state.spec import TensorSpec
from nested_runtime.store.base import Draft, SessionKey, StateStore
from nested_runtime.store.url import open_store

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "nested_runtime/train/configs/hope-nano.json"
Tensors = dict[str, torch.Tensor]


def states(config: dict[str, Any], length: int) -> tuple[tuple[TensorSpec, ...], dict[str, Tensors]]:
    """The model's state after `length` random tokens, and one full of noise."""
    torch.manual_seed(0)
    model = build(config["family"], config["model"])
    with torch.no_grad():
        for parameter in model.parameters():  # fresh output projections are zero and would teach nothing
            parameter.add_(0.02 * torch.randn_like(parameter))
    engine = Engine(model, capacity=1)
    tokens = torch.randint(config["model"]["vocab_size"], (length,)).tolist()
    engine.submit(Sequence("s", tokens, SamplingParams(max_tokens=1, temperature=0), keep_state=True))
    kept: Tensors = {}
    while engine.has_work:
        for event in engine.step():
            if event.result is not None:
                kept = dict(event.result.state)
    noise = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in kept.items()}
    return engine.specs, {"read": kept, "full": noise}


async def measure(
    store: StateStore, specs: tuple[TensorSpec, ...], tensors: Tensors, at_rest: str, rounds: int
) -> dict[str, Any]:
    """Seconds of `rounds` commits, each loaded again, in one session; and its size."""
    key = SessionKey("bench", f"{at_rest}-{time.monotonic_ns()}")
    commits, loads, size, cpu = [], [], 0, [0.0, 0.0]
    async with store.hold(key) as lease:
        for number in range(1, rounds + 1):
            tensors = {name: tensor * 1.001 for name, tensor in tensors.items()}
            began, worked = time.perf_counter(), time.process_time()
            binding = Binding(key.tenant, key.session, number)
            made = Snapshot.take(
                tensors, fingerprint="f", binding=binding, position=number, pending=None, at_rest=at_rest
            )
            draft = Draft(kind="turn", tokens=number, digest=made.header.digest, fingerprint="f")
            size = (await store.commit(lease, number - 1, codec.encode(made), draft)).size
            commits.append(time.perf_counter() - began)
            cpu[0] += time.process_time() - worked
            began, worked = time.perf_counter(), time.process_time()
            _, blob = await store.load(key)
            codec.decode(blob, specs, "f", binding)
            loads.append(time.perf_counter() - began)
            cpu[1] += time.process_time() - worked
    await store.delete(key)
    spent = {
        name: round(1000 * total / rounds, 2) for name, total in zip(("commit_cpu_ms", "load_cpu_ms"), cpu, strict=True)
    }
    return {"bytes": size, **_percentiles("commit", commits), **_percentiles("load", loads), **spent}


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"{name}_p50_ms": round(cuts[49] * 1000, 2), f"{name}_p99_ms": round(cuts[98] * 1000, 2)}


@contextmanager
def own_redis(folder: Path) -> Iterator[str]:
    """A redis-server with an append-only file, on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def server_cpu(url: str) -> float:
    """CPU seconds the store's own process has used; 0 where it has none."""
    if not url.startswith("redis"):
        return 0.0
    used = redis.Redis.from_url(url).info("cpu")
    return float(used["used_cpu_sys"]) + float(used["used_cpu_user"])


async def measure_all(urls: dict[str, str], config: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """One row per store, state and form at rest."""
    specs, known = states(config, 512)
    rows = []
    for name, url in urls.items():
        async with open_store(url) as store:
            for kind, tensors in known.items():
                for at_rest in AT_REST:
                    row = {"store": name, "durability": store.durability, "state": kind, "at_rest": at_rest}
                    began = server_cpu(url)
                    row |= await measure(store, specs, tensors, at_rest, rounds)
                    rows.append(row | {"store_cpu_ms": round(1000 * (server_cpu(url) - began) / rounds, 2)})
    return rows


def main() -> int:
    """Measure, print a table, write build/bench/state_io.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--redis", metavar="URL", help="measure this one instead of starting our own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = json.loads(args.config.read_text())
    specs = build(config["family"], config["model"]).state_spec()
    with tempfile.TemporaryDirectory() as folder:
        urls = {"sqlite": f"sqlite:///{folder}/sessions.db"}
        if args.redis:
            rows = asyncio.run(measure_all({**urls, "redis": args.redis}, config, args.rounds))
        elif shutil.which("redis-server"):
            with own_redis(Path(folder)) as url:
                rows = asyncio.run(measure_all({**urls, "redis": url}, config, args.rounds))
        else:
            print("no redis-server: only SQLite is measured", file=sys.stderr)
            rows = asyncio.run(measure_all(urls, config, args.rounds))
    report = {
        "model": args.config.stem,
        "state_bytes": sum(spec.num_bytes for spec in specs),
        "rounds": args.rounds,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }
    target = ROOT / "build/bench/state_io.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1))
    print(
        f"state of {report['model']}: {report['state_bytes']:,} bytes; {args.rounds} rounds; ms; load average", end=" "
    )
    print(f"{report['load_average']:.1f}")
    columns = list(rows[0])
    print("  ".join(f"{name:>13}" for name in columns))
    for row in rows:
        print("  ".join(f"{row[name]:>13}" for name in columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
