"""Replicas of the server under Ray Serve: it starts them, restarts those that die, and is the proxy before them.

Ray's ConsistentHashRouter sends a session (header `X-Session-ID`) to one replica as long as that replica lives, so its
memory is resident there. As with any proxy this is a matter of speed: the lease in the store orders a session's turns.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

# Ray reads these when it is imported. Its own limits (5 and 30 s) are too short for a loaded machine.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "90")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "90")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig

__all__ = ["NAME", "run"]

NAME = "nested"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def run(
    make_app: Callable[[], Any],
    *,
    replicas: int,
    host: str,
    port: int,
    requests: int,
    drain_seconds: float,
    announce: Callable[[], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then let running turns end.

    make_app       builds the ASGI application of a replica, in its process; its lifespan opens store and engines
    requests       that one replica may have at a time; more wait in the proxy
    announce       called when requests are answered

    A cluster named by RAY_ADDRESS is used, else one is started on this machine for as long as this runs.
    """
    stopped = threading.Event()
    _start_ray(replicas)
    try:
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port))
        serve.run(_application(make_app, replicas, requests, drain_seconds), name=NAME, route_prefix="/")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        announce()
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def _start_ray(replicas: int) -> None:
    if "RAY_ADDRESS" in os.environ:
        ray.init()
        return
    # Ray counts CPUs to place what it starts; the replicas' threads are theirs to choose.
    ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=replicas + 1, log_to_driver=False)


def _application(make_app: Callable[[], Any], replicas: int, requests: int, drain_seconds: float) -> Any:
    def build() -> Any:  # Ray recognises a builder by its being a function
        return make_app()

    replica = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=requests,
        graceful_shutdown_timeout_s=drain_seconds,
        health_check_period_s=5,
        health_check_timeout_s=60,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    return replica.bind()
