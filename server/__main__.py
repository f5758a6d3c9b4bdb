"""nested-serve: serve models with per-session memories over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from nested_runtime.errors import ConfigError, NestedError

from . import logs, on_ray
from .app import create_app, running
from .assembly import assemble
from .checkup import report
from .deps import Service
from .options import parse
from .settings import Settings

__all__ = ["listening", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop. Exit status 2 = bad options, model or store."""
    try:
        settings = parse(argv)
        if settings.check:
            return report(settings)
        if settings.ray_replicas:
            on_ray.serve(settings, lambda: _announce_replicas(settings))
            return 0
        with logs.configured(settings.log_format):
            service = assemble(settings)
            with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop where there is one
                runner.run(_serve(settings, service))
    except NestedError as error:
        print(f"nested-serve: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(settings: Settings, service: Service) -> None:
    with listening(settings) as listener:
        async with running(service):
            config = uvicorn.Config(
                create_app(service),
                root_path=settings.root_path,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile_password=settings.ssl_keyfile_password,
                ssl_ca_certs=settings.ssl_ca_certs,
                access_log=False,
                log_config=None,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            )
            server = _Server(config)
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGINT, server.handle_exit, signal.SIGINT, None)
            loop.add_signal_handler(signal.SIGTERM, _leave, service, server)
            _announce(settings, service, listener)
            await server.serve(sockets=[listener])


def _leave(service: Service, server: uvicorn.Server) -> None:
    """Shut down, after notice to the proxies that look at /ready; asked a second time, at once."""
    seconds = 0.0 if service.leaving else service.settings.notice_seconds
    service.leaving = True
    asyncio.get_running_loop().call_later(seconds, server.handle_exit, signal.SIGTERM, None)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the drain after it must not be skipped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `_serve`."""
        yield


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The bound socket; a Unix socket's file is removed at the end."""
    where = settings.uds or f"{settings.host}:{settings.port}"
    try:
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(settings.uds)
        else:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error}; choose another --port or --host") from None
    with contextlib.closing(listener):
        yield listener
    if settings.uds is not None:
        Path(settings.uds).unlink(missing_ok=True)


def _announce(settings: Settings, service: Service, listener: socket.socket) -> None:
    scheme = "https" if settings.ssl_certfile else "http"
    where = settings.uds or f"{scheme}://{settings.host}:{listener.getsockname()[1]}"
    if not service.keys:
        print("nested-serve: no API keys: whoever can connect can use every session", file=sys.stderr)
    names = ", ".join(service.runtime.models)
    print(f"nested-serve: {names} on {where}, sessions in {service.shown_store}", file=sys.stderr, flush=True)


def _announce_replicas(settings: Settings) -> None:
    where = f"http://{settings.host}:{settings.port}"
    print(f"nested-serve: {settings.ray_replicas} replicas on {where}, under Ray Serve", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
