"""Does a second replica on a second core double the work done? One Redis, hope-nano, one thread and one core a replica.

    python -m benchmarks.replicas [--rounds 5] [--seconds 20] [--clients 16]

Each replica is pinned to a core of its own; Redis and the clients run wherever there is room, so beside two replicas on
two cores they take some of the replicas' time. Rounds of one replica and of two replicas alternate, and the ratio is
taken within a round, because the load of a shared machine changes. Every client has a session and its replica, as
behind a proxy that hashes. Prints the rounds and the ratio, writes build/bench/replicas.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.serving import Load, measure
from benchmarks.state_io import ROOT, own_redis

START_SECONDS = 600.0


@contextmanager
def replica(model: str, store: str, core: int, folder: Path) -> Iterator[str]:
    """A server on one core; its URL."""
    log = folder / f"replica-{core}.log"
    command = [sys.executable, "-m", "server", "--model", model, "--store", store, "--port", "0", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--slots", "64", "--no-web"], env=environment, stderr=output)
    os.sched_setaffinity(process.pid, {core})  # before it has threads, which inherit it
    try:
        deadline = time.monotonic() + START_SECONDS
        while " on http://" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"nested-serve did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield log.read_text().partition(" on ")[2].partition(",")[0]
    finally:
        process.terminate()
        process.wait()


async def together(urls: list[str], model: str, clients: int, seconds: float) -> float:
    """Reply tokens a second of all replicas, the clients spread over them."""
    loads = [Load(url, "", model, 200, 32, seconds, f"replica-{number}") for number, url in enumerate(urls)]
    results = await asyncio.gather(*(measure(load, clients // len(urls), memory=True) for load in loads))
    if any(result.errors for result in results):
        raise SystemExit(f"requests failed: {results}")
    return sum(result.output_tokens_per_second for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hope-nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each half of a round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "replicas.json")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("this machine lends one core only; two are needed")
    rounds = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = stack.enter_context(own_redis(Path(folder)))
        urls = [stack.enter_context(replica(given.model, store, core, Path(folder))) for core in cores]
        for number in range(given.rounds):
            one = asyncio.run(together(urls[:1], given.model, given.clients, given.seconds))
            two = asyncio.run(together(urls, given.model, given.clients, given.seconds))
            rounds.append({"one": one, "two": two, "ratio": round(two / one, 3), "load_average": os.getloadavg()[0]})
            print(f"round {number + 1}: one {one:.0f} tokens/s, two {two:.0f}, ratio {two / one:.2f}", flush=True)
    ratio = statistics.median(row["ratio"] for row in rounds)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"clients": given.clients, "ratio": ratio, "rounds": rounds}, indent=1))
    print(f"two replicas on two cores do {ratio:.2f} times the work of one on one (median of {given.rounds} rounds)")


if __name__ == "__main__":
    main()
