"""Load on a running server: throughput, time to first token and between tokens; 1-64 clients, without and with memory.

    nested-serve --model hope-nano &
    python benchmarks/serving.py --model hope-nano --url http://127.0.0.1:8000

Every client asks again as soon as it has been answered, each with a conversation of its own, over streams. Tokens are
counted by the server's usage; a token's time is that of the chunk it came in. Prints a table and writes
build/bench/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Tell me more about the lighthouse, the keeper and the storm of that winter. "


@dataclass(frozen=True)
class Load:
    """What every client asks."""

    url: str
    key: str
    model: str
    prompt_chars: int
    tokens: int
    seconds: float
    name: str = "bench"  # sessions begin with it


@dataclass
class Seen:
    """What all clients of one run saw together."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Result:
    """One row."""

    clients: int
    memory: bool
    seconds: float
    requests: int
    errors: int
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    first_ms_p50: float
    first_ms_p99: float
    between_ms_p50: float
    between_ms_p99: float
    whole_ms_p50: float


async def ask(client: httpx.AsyncClient, load: Load, session: str | None, number: int, seen: Seen) -> None:
    """One streamed request."""
    text = f"{number}. {TEXT * (load.prompt_chars // len(TEXT) + 1)}"[: load.prompt_chars]
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": load.tokens,
        "ignore_eos": True,
        "min_tokens": load.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"X-Session-ID": session} if session else {}
    began = last = time.perf_counter()
    count = 0
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        if reply.status_code != 200:
            await reply.aread()
            seen.errors += 1
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                seen.errors += 1
                return
            if chunk.get("usage"):
                seen.prompt_tokens += chunk["usage"]["prompt_tokens"]
                seen.tokens += chunk["usage"]["completion_tokens"]
            if not chunk["choices"] or not chunk["choices"][0]["delta"].get("content"):
                continue
            now = time.perf_counter()
            (seen.between if count else seen.first).append(now - last)
            last = now
            count += 1
    seen.whole.append(time.perf_counter() - began)


async def measure(load: Load, clients: int, *, memory: bool) -> Result:
    """Load the server for a while."""
    seen = Seen()
    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=load.url, headers=headers, timeout=600.0, limits=limits) as client:
        await ask(client, load, None, 0, Seen())  # warm
        began = time.perf_counter()

        async def one(name: int) -> None:
            number = 0
            session = f"{load.name}-{os.getpid()}-{clients}-{name}" if memory else None
            while time.perf_counter() - began < load.seconds:
                number += 1
                await ask(client, load, session, number, seen)

        await asyncio.gather(*(one(name) for name in range(clients)))
        seconds = time.perf_counter() - began
        for name in range(clients if memory else 0):
            await client.delete(f"/v1/sessions/{load.name}-{os.getpid()}-{clients}-{name}")
    if not seen.whole:
        raise SystemExit(f"no request of {clients} clients was answered ({seen.errors} errors)")
    return Result(
        clients,
        memory,
        round(seconds, 2),
        len(seen.whole),
        seen.errors,
        round(len(seen.whole) / seconds, 2),
        round(seen.tokens / seconds, 1),
        round(seen.prompt_tokens / seconds, 1),
        *(milliseconds(times, part) for times in (seen.first, seen.between) for part in (50, 99)),
        milliseconds(seen.whole, 50),
    )


def milliseconds(times: Sequence[float], percent: int) -> float:
    """A percentile."""
    if not times:
        return 0.0
    if len(times) == 1:
        return round(times[0] * 1e3, 2)
    return round(statistics.quantiles(times, n=100, method="inclusive")[percent - 1] * 1e3, 2)


def table(results: Sequence[Result]) -> str:
    """Aligned columns."""
    names = "clients memory req/s tok/s TTFT-p50 TTFT-p99 ITL-p50 ITL-p99 whole-p50 errors"
    rows = [tuple(names.split()), *(_row(one) for one in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def _row(one: Result) -> tuple[str, ...]:
    rates = (one.requests_per_second, one.output_tokens_per_second)
    times = (one.first_ms_p50, one.first_ms_p99, one.between_ms_p50, one.between_ms_p99, one.whole_ms_p50)
    numbers = [*(f"{rate:.2f}" for rate in rates), *(f"{time:.1f}" for time in times)]
    return (str(one.clients), "session" if one.memory else "none", *numbers, str(one.errors))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--model", default="hope-nano")
    parser.add_argument("--clients", default="1,4,16,64", help="comma-separated numbers")
    parser.add_argument("--prompt-chars", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a reply")
    parser.add_argument("--seconds", type=float, default=20.0, help="of every row")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "serving.json")
    given = parser.parse_args(argv)
    load = Load(given.url, given.key, given.model, given.prompt_chars, given.tokens, given.seconds)
    results = []
    for memory in (False, True):
        for clients in (int(text) for text in given.clients.split(",")):
            results.append(asyncio.run(measure(load, clients, memory=memory)))
            print(table(results[-1:]).splitlines()[-1], flush=True)
            write(given.out, load, results)
    print(f"\n{table(results)}\n\nwritten to {given.out}")


def write(path: Path, load: Load, results: Sequence[Result]) -> None:
    """After every row, so that an interrupted run leaves what it measured."""
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    asked = {"model": load.model, "prompt_chars": load.prompt_chars, "tokens": load.tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(one) for one in results]
    path.write_text(json.dumps({"machine": machine, "load": asked, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
