"""nested-serve --ray-replicas: the same application in several processes under Ray Serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nested_runtime.errors import ConfigError

from .settings import Settings

__all__ = ["serve"]


def serve(settings: Settings, announce: Callable[[], None]) -> None:
    """Run replicas until told to stop. ConfigError when Ray is absent or an option cannot be honoured.

    announce   called when requests are answered
    """
    _check(settings)
    try:
        from nested_runtime.backends import ray
    except ImportError as error:
        raise ConfigError(
            f"--ray-replicas needs Ray Serve ({error}); pip install 'nested-runtime[serve,ray]'"
        ) from None

    def make_app() -> Any:
        from . import logs
        from .app import create_app
        from .assembly import assemble

        lines = logs.configured(settings.log_format)
        lines.__enter__()
        app = create_app(assemble(settings))
        app.state.lines = lines  # they are written, into Ray's log of the replica, for as long as it lives
        return app

    engine = settings.engine
    ray.run(
        make_app,
        replicas=settings.ray_replicas,
        host=settings.host,
        port=settings.port,
        requests=engine.slots + engine.queue,
        drain_seconds=settings.drain_seconds,
        announce=announce,
    )


def _check(settings: Settings) -> None:
    """What would be ignored or do harm is refused."""
    if not settings.store_url.startswith(("redis://", "rediss://")):
        raise ConfigError(
            f"--ray-replicas shares sessions over Redis; give --store redis://..., not {settings.store_url}"
        )
    given = {
        "--uds": settings.uds,
        "--ssl-certfile": settings.ssl_certfile,
        "--root-path": settings.root_path,
        "--port 0": settings.port == 0,
    }
    for name, value in given.items():
        if value:
            raise ConfigError(f"{name} is not supported with --ray-replicas, whose proxy listens on --host and --port")
    if settings.admin_key_file is not None:
        raise ConfigError(
            "--admin-key-file is not supported with --ray-replicas: an admin request would reach any one replica; run "
            "one more nested-serve with it on the same store"
        )
