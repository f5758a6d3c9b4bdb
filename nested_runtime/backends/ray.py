"""Ray Serve: N replicas of the server on one machine or a cluster, a session always at the same replica while it lives.

    nested-serve --ray-replicas 2 --store redis://...

Each replica is a whole server (HTTP surface, sessions, engine) in a Ray actor; all share the store. Ray's consistent-hash
router reads the header X-Session-ID, so a session's memory stays where it is resident, and a replica that leaves moves
only its own sessions. Affinity is best effort and a matter of speed: the lease in the store orders a session's turns.
`RAY_ADDRESS` names a running cluster; without it a local one is started. Extra: `ray`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from nested_runtime.errors import ConfigError

__all__ = ["RayOptions", "serve_replicas"]

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
PATIENCE = {  # Ray's 5 seconds are too few on a machine whose cores are busy: the proxy never becomes ready
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "90",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class RayOptions:
    """Where and how many.

    replicas       servers
    host, port     of Ray's HTTP proxy
    num_cpus       cores reserved for each replica
    in_flight      requests one replica works on at a time, more wait in the proxy
    drain_seconds  how long a replica that is to go waits for its running turns
    """

    replicas: int
    host: str = "127.0.0.1"
    port: int = 8000
    num_cpus: float = 1.0
    in_flight: int = 256
    drain_seconds: float = 20.0


def serve_replicas(
    build: Callable[[], Any],
    options: RayOptions,
    stop: threading.Event,
    ready: Callable[[], None],
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Run replicas of the ASGI application that `build` makes (in the replica's own process) until `stop` is set.

    build    importable and picklable; its lifespan opens and drains the server
    ready    called when all replicas answer
    """
    for name, value in PATIENCE.items():
        environ.setdefault(name, value)
    try:
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions, RequestRouterConfig
    except ImportError as error:
        raise ConfigError(f"Ray Serve is not installed ({error}); pip install 'nested-runtime[ray]'") from None
    alone = {} if "RAY_ADDRESS" in environ else {"_node_ip_address": "127.0.0.1", "num_cpus": _cores(options)}
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **alone)
    try:
        where = HTTPOptions(host=options.host, port=options.port, location="HeadOnly" if alone else "EveryNode")
        serve.start(http_options=where)
        deployment = serve.deployment(
            serve.ingress(build)(_Replica),
            name="server",
            num_replicas=options.replicas,
            max_ongoing_requests=options.in_flight,
            graceful_shutdown_timeout_s=options.drain_seconds + 5,
            ray_actor_options={"num_cpus": options.num_cpus},
            request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        )
        serve.run(deployment.bind(), name="nested")
        ready()
        stop.wait()
        serve.shutdown()
    finally:
        ray.shutdown()


class _Replica:
    """What Ray makes an actor of; the ASGI application does everything."""


def _cores(options: RayOptions) -> float:
    """Cores to offer where there is no cluster: enough for the replicas and Ray's own actors, however few are real."""
    return max(os.cpu_count() or 1, options.replicas * options.num_cpus + 1)
