"""Replicas over one Redis behind the shipped HAProxy configuration: nothing lost or doubled, whatever is killed."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

CONFIG = Path(__file__).parents[3] / "deploy" / "haproxy.cfg"
LEASE = 2.0
pytestmark = [pytest.mark.redis, pytest.mark.replicas, pytest.mark.timeout(1200)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@dataclass
class Cluster:
    """Replicas, their ports fixed so that a restarted one takes its place again, and the proxy before them."""

    url: str
    replicas: list[Any]
    redis: Any

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120.0)

    def loads(self) -> int:
        """States the replicas have read from Redis since they started."""
        return sum(counted(replica, "nested_memory_load_seconds_count") for replica in self.replicas)

    def turns(self) -> list[int]:
        """Turns each replica has committed since it started."""
        return [counted(replica, "nested_memory_commit_seconds_count") for replica in self.replicas]


def counted(replica: Any, metric: str) -> int:
    with replica.client() as http:
        found = re.search(rf"^{metric} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def configured(ports: list[int], bind: int) -> str:
    """The shipped configuration with our addresses in the places of its own, and nothing else changed."""
    addresses = {f"127.0.0.1:{8001 + i}": f"127.0.0.1:{port}" for i, port in enumerate(ports)}
    lines = []
    for line in CONFIG.read_text(encoding="utf-8").splitlines():
        if line.startswith("    bind "):
            lines.append(f"    bind 127.0.0.1:{bind}")
        elif line.startswith("    server "):
            _, name, address, *rest = line.split()
            if address in addresses:
                lines.append(" ".join(["    server", name, addresses[address], *rest]))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.fixture
def cluster(serve: Any, redis: Any, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Start N replicas on one Redis behind HAProxy."""
    haproxy = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
    if haproxy is None:
        pytest.skip("haproxy is not installed (Debian: apt-get install haproxy)")
    processes: list[subprocess.Popen[bytes]] = []

    def start(count: int, lease: float = LEASE) -> Cluster:
        store = redis("everysec")
        ports = [free_port() for _ in range(count)]
        options = ("--notice-seconds", "3", "--drain-seconds", "30")
        settings = {"LEASE_SECONDS": lease, "WAIT_SECONDS": 60}
        replicas = [serve(store.url, "--port", str(port), *options, **settings) for port in ports]
        bind = free_port()
        config = tmp_path / "haproxy.cfg"
        config.write_text(configured(ports, bind), encoding="utf-8")
        with (tmp_path / "haproxy.log").open("wb") as log:
            processes.append(subprocess.Popen([haproxy, "-db", "-f", str(config)], stderr=log))
        made = Cluster(f"http://127.0.0.1:{bind}", replicas, store)

        def answers() -> bool:
            try:
                return httpx.get(f"{made.url}/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(answers)
        time.sleep(0.5)  # every replica was checked once
        return made

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("count", [2, 3])
def test_a_replica_is_killed_and_restarted(
    cluster: Any,
    traffic_on: Any,
    settled: Any,
    equal_alone: Any,
    healthy: Any,
    scaled: Callable[[int], int],
    count: int,
) -> None:
    """500 turns over 50 sessions; SIGKILL in the middle of turns: nothing lost, nothing doubled."""
    made = cluster(count)
    sessions, length = [f"user-{n}" for n in range(max(6, scaled(50)))], max(4, scaled(10))
    whole, traffic = len(sessions) * length, traffic_on(made.client, with_keys=True)
    running = threading.Thread(target=traffic.run, args=(sessions, length))
    running.start()
    victim = made.replicas[0]
    until(lambda: traffic.done >= whole // 3 or not running.is_alive(), 900)
    victim.stop(signal.SIGKILL)
    at_kill = traffic.done
    until(lambda: traffic.done >= whole // 2 or not running.is_alive(), 900)
    victim.start()
    running.join(900)
    assert not running.is_alive()
    assert at_kill < traffic.done == whole
    with made.client() as http:
        for name in sessions:
            assert settled(http, name)["version"] == length
    equal_alone(traffic)
    until(lambda: ready(victim))
    time.sleep(1.2)  # the proxy has seen it
    traffic.run(sessions, length + 1)
    assert all(made.turns()), "a replica took no sessions back"
    equal_alone(traffic)
    healthy(victim)
    print(f"{count} replicas, {whole} turns, killed after {at_kill}: {dict(traffic.statuses)}")


def test_a_rolling_restart_loses_no_request(
    cluster: Any, traffic_on: Any, equal_alone: Any, healthy: Any, scaled: Callable[[int], int]
) -> None:
    """Each replica in turn gets SIGTERM under load: every request is answered at the first try, without any key."""
    made = cluster(2, lease=20.0)  # nobody dies, so nobody waits for it; a starved server must not lose its own
    sessions, length = [f"user-{n}" for n in range(max(6, scaled(30)))], max(6, scaled(20))
    traffic = traffic_on(made.client, with_keys=False)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            traffic.run(sessions, length)
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failure.append(error)

    running = threading.Thread(target=run)
    running.start()
    for share, replica in enumerate(made.replicas, start=1):
        until(lambda share=share: traffic.done >= len(sessions) * length * share // 4 or bool(failure), 300)
        replica.stop(signal.SIGTERM)
        replica.start()
        until(lambda replica=replica: ready(replica))
        time.sleep(1.2)  # the proxy has seen it
    running.join(900)
    assert not failure, failure[0]
    equal_alone(traffic)
    healthy(made.replicas[0])


def ready(replica: Any) -> bool:
    with replica.client() as http:
        return bool(http.get("/ready").status_code == 200)


def test_a_session_stays_where_its_memory_is(cluster: Any, turn: Any) -> None:
    """Header, body and path name the same replica, so nothing is loaded; moving a session costs exactly one load."""
    made = cluster(2)
    names = [f"user/{n} é" for n in range(12)]
    with made.client() as http:
        for number in range(3):
            for name in names:
                given: dict[str, Any] = {"session_id": name}
                if number != 1:
                    given = {"headers": {"X-Session-ID": name.encode()}}
                assert turn(http, f"fact {number}", **given).status_code == 200
        for name in names:
            path = name.replace("/", "%2F").replace(" ", "%20")
            assert http.post(f"/v1/sessions/{path}/learn", json={"model": "tiny", "text": "more"}).status_code == 200
        assert made.loads() == 0
        shares = made.turns()
        assert sum(shares) == 4 * len(names)
        assert all(share % 4 == 0 and share > 0 for share in shares), shares
        moved = shares[0] // 4
        made.replicas[0].stop(signal.SIGTERM)
        made.replicas = made.replicas[1:]
        for _ in range(2):
            for name in names:
                assert turn(http, "and now?", headers={"X-Session-ID": name.encode()}).status_code == 200
        assert made.loads() == moved
        assert http.get("/admin/stats", headers={"Authorization": "Bearer key-of-the-admin"}).status_code == 403


def test_without_redis_the_memoryless_are_served(cluster: Any, turn: Any) -> None:
    """No replica is ready then; requests without memory are answered, the others get the server's own 503."""
    made = cluster(2)
    with made.client() as http:
        assert turn(http, "hello", "s").status_code == 200
        made.redis.kill()
        until(lambda: not any(ready(replica) for replica in made.replicas))
        time.sleep(1.5)  # the proxy has seen it
        assert turn(http, "hello").status_code == 200
        refused = turn(http, "hello", "s")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "store_unavailable"
