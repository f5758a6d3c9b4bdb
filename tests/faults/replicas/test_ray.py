"""Replicas under Ray Serve: one is killed in the middle and Ray starts another; nothing is lost or doubled."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="Ray Serve is not installed (make test-ray makes an environment for it)")
pytestmark = [pytest.mark.redis, pytest.mark.ray, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[3]
REPLICAS = 2


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def replicas_below(pid: int) -> set[int]:
    """Processes of the deployment among the descendants of a process."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended
    below, found = {pid}, True
    while found:
        found = {child for child, parent in parents.items() if parent in below} - below
        below |= found
    return {child for child in below if b"ServeReplica" in titles.get(child, b"")}


class RayServer:
    """`nested-serve --ray-replicas`, and where its replicas are."""

    def __init__(self, folder: Path, model: Path, store: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url, self._log = f"http://127.0.0.1:{port}", folder / "ray.log"
        options = ["--ray-replicas", str(REPLICAS), "--model", str(model), "--store", store, "--port", str(port)]
        limits = ["--threads", "1", "--slots", "8", "--max-context", "4096", "--lease-seconds", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NESTED_WAIT_SECONDS": "60"}
        environment.pop("RAY_ADDRESS", None)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server", *options, *limits], env=environment, stdout=log, stderr=log
            )

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120.0)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def is_ready(self) -> bool:
        assert self._process.poll() is None, self.log()
        return f"{REPLICAS} replicas on" in self.log()

    def replicas(self) -> set[int]:
        return replicas_below(self._process.pid)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


@pytest.fixture
def ray_server(redis: Any, model_folder: Path, tmp_path: Path) -> Iterator[RayServer]:
    server = RayServer(tmp_path, model_folder, redis("everysec").url)
    try:
        until(server.is_ready, 400)
        yield server
    finally:
        server.stop()


def test_a_replica_is_killed_and_ray_starts_another(
    ray_server: RayServer, traffic_on: Any, settled: Any, equal_alone: Any, scaled: Callable[[int], int]
) -> None:
    """500 turns over 50 sessions."""
    sessions, length = [f"user-{n}" for n in range(max(6, scaled(50)))], max(4, scaled(10))
    whole, traffic = len(sessions) * length, traffic_on(ray_server.client, with_keys=True)
    before = ray_server.replicas()
    assert len(before) == REPLICAS
    running = threading.Thread(target=traffic.run, args=(sessions, length))
    running.start()
    until(lambda: traffic.done >= whole // 3 or not running.is_alive(), 600)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    at_kill = traffic.done
    running.join(900)
    assert not running.is_alive()
    assert at_kill < traffic.done == whole, dict(traffic.statuses)
    until(lambda: len(ray_server.replicas() - before) == 1, 180)
    until(lambda: len(ray_server.replicas()) == REPLICAS, 60)
    with ray_server.client() as http:
        for name in sessions:
            assert settled(http, name)["version"] == length
    equal_alone(traffic)
    traffic.run(sessions, length + 1)
    equal_alone(traffic)
    print(f"{REPLICAS} replicas under Ray, {whole} turns, killed after {at_kill}: {dict(traffic.statuses)}")


def test_a_session_stays_on_its_replica(ray_server: RayServer, turn: Any) -> None:
    """The header names the session: its memory is never loaded from Redis again."""
    with ray_server.client() as http:
        for number in range(3):
            for name in range(8):
                assert turn(http, f"fact {number}", f"user-{name}").status_code == 200
        # A request without a session goes to any replica: after 40 both have answered.
        texts = [http.get("/metrics").text for _ in range(40)]
    assert {counted(text, "nested_memory_load_seconds_count") for text in texts} == {0}
    shares = {counted(text, "nested_memory_commit_seconds_count") for text in texts}
    assert all(0 < share < 24 and share % 3 == 0 for share in shares), shares
    assert sum(shares) == (24 if len(shares) == REPLICAS else 12), shares


def counted(metrics: str, name: str) -> int:
    found = re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)
    return int(float(found[1])) if found else 0
