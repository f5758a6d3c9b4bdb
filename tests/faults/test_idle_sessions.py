"""Ten thousand idle sessions: the server holds no more of them than its slots' worth of memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

ADMIN = {"Authorization": "Bearer key-of-the-admin"}
SLOTS = 8  # as conftest starts servers
SLACK = 24 << 20  # allocators, page tables, database pages


@pytest.fixture
def wide_folder(write_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose state is large beside whatever else a session costs."""
    return write_tiny(tmp_path / "wide", 1, "tiny", dim=128, heads=4, head_dim=32)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_idle_sessions_hold_no_memory(
    serve: Any, wide_folder: Path, tmp_path: Path, scaled: Callable[[int], int]
) -> None:
    count, warm = scaled(10_000), scaled(1_000)
    probe = serve("memory:", model=wide_folder)
    with probe.client() as http:
        http.post("/v1/sessions/one/learn", json={"text": "x"})
        state = http.get("/admin/stats", headers=ADMIN).json()["resident"]["bytes"]
    probe.stop()
    limit = SLOTS * state
    server = serve(f"sqlite:///{tmp_path}/idle.db", "--resident-bytes", str(limit), "--retain", "1", model=wide_folder)

    def learn(http: httpx.Client, number: int) -> None:
        reply = http.post(f"/v1/sessions/idle{number}/learn", json={"text": f"number {number}"})
        assert reply.status_code == 200, reply.text

    with server.client() as http, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: learn(http, number), range(warm)))
        before = server.rss()
        list(pool.map(lambda number: learn(http, number), range(warm, count)))
        after = server.rss()
        stats = http.get("/admin/stats", headers=ADMIN).json()
    print(
        f"{count} sessions of {state:,} bytes = {count * state:,}; "
        f"resident {stats['resident']['bytes']:,} of {limit:,}; "
        f"RSS {before:,} after {warm}, {after:,} after all"
    )
    assert stats["store"]["sessions"] == count
    assert stats["resident"]["bytes"] <= limit
    assert after - before <= limit + SLACK
    if scaled(100) >= 100:
        assert (count - warm) * state > 10 * (limit + SLACK), "the test would not see a leak"
