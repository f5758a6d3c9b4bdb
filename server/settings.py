"""Settings of the server as one frozen dataclass, and the checks that need no I/O."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path

from nested_runtime.config import EngineConfig, SessionConfig
from nested_runtime.errors import ConfigError
from nested_runtime.store.base import Limits

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What `nested-serve` was told.

    models          folders or names of checkpoints, the first is the default in examples
    store           store URL; None = SQLite in `data_dir`
    max_body_bytes  larger request bodies are 413
    notice_seconds  how long SIGTERM goes on serving while /ready says no, so that a proxy can look elsewhere
    drain_seconds   how long SIGTERM then waits for running turns
    keep_alive      seconds between SSE comments while nothing else is sent
    otlp_endpoint   OpenTelemetry collector that traces are sent to
    requests_in_flight  of one tenant at a time; more are 429
    check           look at what would run and report, instead of serving
    web             whether the web page is served at /
    backend         what runs the models: "native" or "vllm"
    ray_replicas    processes under Ray Serve; 0 = this one alone
    sweep_seconds   between two looks at expired sessions, and at sessions that another server deleted
    """

    models: tuple[str, ...]
    store: str | None = None
    data_dir: Path = Path("~/.nested")
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    insecure: bool = False
    log_ids: bool = False
    log_format: str = "text"
    otlp_endpoint: str | None = None
    uds: str | None = None
    root_path: str = ""
    cors_origins: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    ssl_ca_certs: str | None = None
    max_body_bytes: int = 8 << 20
    notice_seconds: float = 0.0
    drain_seconds: float = 20.0
    keep_alive: float = 10.0
    session_ttl: float | None = None
    requests_in_flight: int = 256
    sweep_seconds: float = 60.0
    check: bool = False
    web: bool = True
    backend: str = "native"
    ray_replicas: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    sessions: SessionConfig = field(default_factory=SessionConfig)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no model to serve; give --model with a checkpoint folder or name")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; give 0 to 65535")
        for name in ("max_body_bytes", "requests_in_flight", "sweep_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a number over 0")
        if not 0 <= self.notice_seconds < math.inf:
            raise ConfigError(f"notice_seconds is {self.notice_seconds!r}; give a number, at least 0")
        if self.ray_replicas < 0:
            raise ConfigError(f"ray_replicas is {self.ray_replicas}; give how many, or 0 for none")
        if self.session_ttl is not None and not self.session_ttl >= self.sessions.lease_seconds:
            raise ConfigError(
                f"session_ttl is {self.session_ttl:g}, under lease_seconds {self.sessions.lease_seconds:g}: a session "
                "could expire during its own turn; raise --session-ttl or lower --lease-seconds"
            )
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("TLS needs both --ssl-keyfile and --ssl-certfile")
        if self.api_key_file is None and not self.insecure and not self.is_local:
            raise ConfigError(
                f"host {self.host!r} can be reached from other machines and no API keys are set; give --api-key-file, "
                "bind to 127.0.0.1, or say --insecure"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def store_url(self) -> str:
        """The store's URL, the default one included."""
        if self.store is not None:
            return self.store
        return f"sqlite:///{self.data_dir.expanduser().resolve() / 'sessions.db'}"
