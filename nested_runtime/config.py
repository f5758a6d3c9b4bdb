"""Settings as frozen dataclasses. The environment is read in one function, `from_environment`, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from nested_runtime.errors import ConfigError

__all__ = ["EngineConfig", "SessionConfig", "from_environment"]

PREFIX = "NESTED_"


@dataclass(frozen=True)
class EngineConfig:
    """How one model is run.

    slots               sessions that can be worked on at the same time (each holds one state)
    max_batch_tokens    tokens of one engine step
    queue               sequences that may wait for a slot before requests get 429
    max_context         tokens one turn may read and write
    prefix_cache_bytes  host memory for states after prompt prefixes, of all sessions together; 0 = off
    update_share        time for updates of levels between two steps that decode, in units of a step's time
    kv_bytes            keys and values of all running sequences of a model with attention
    threads             torch threads; 0 = leave torch's choice
    quantize            "none", or "int8": products of a HOPE model on the CPU, frozen weights of attention models
    """

    slots: int = 16
    max_batch_tokens: int = 512
    queue: int = 256
    max_context: int = 32_768
    prefix_cache_bytes: int = 64 << 20
    kv_bytes: int = 1 << 30
    update_share: float = 1.5
    threads: int = 0
    quantize: str = "none"

    def __post_init__(self) -> None:
        if self.quantize not in ("none", "int8"):
            raise ConfigError(f"quantize is {self.quantize!r}; give none or int8")
        _check(self, zero_allowed=("prefix_cache_bytes", "threads", "queue", "update_share"))


@dataclass(frozen=True)
class SessionConfig:
    """How sessions are held.

    lease_seconds      a lease is renewed after a third of it; a server that stops longer is fenced
    wait_seconds       how long a turn waits for a busy session before 409
    waiting            turns that may wait for one session before 409
    resident_bytes     host memory for states of recently used sessions
    default_tokens     max_tokens of a request that names none
    at_rest            "exact", or "bf16": states are rounded to half their size after every turn
    consolidate_after  seconds without a turn after which a server with nothing to do consolidates a session; 0 = never
    consolidate_decay  what the faster levels lose of their deltas then, 0 to 1
    kept_kv_bytes      keys and values kept with a session between turns: the newest that fit; 0 = none
    """

    lease_seconds: float = 30.0
    wait_seconds: float = 30.0
    waiting: int = 8
    resident_bytes: int = 256 << 20
    default_tokens: int = 256
    at_rest: str = "exact"
    kept_kv_bytes: int = 64 << 20
    consolidate_after: float = 0.0
    consolidate_decay: float = 0.0

    def __post_init__(self) -> None:
        optional = ("wait_seconds", "waiting", "resident_bytes", "kept_kv_bytes")
        _check(self, zero_allowed=(*optional, "consolidate_after", "consolidate_decay"))
        if self.consolidate_decay > 1:
            raise ConfigError(f"consolidate_decay is {self.consolidate_decay!r}; give 0 to 1")


def _check(config: EngineConfig | SessionConfig, zero_allowed: tuple[str, ...]) -> None:
    for name, value in asdict(config).items():
        if isinstance(value, str):
            continue
        if value < 0 or (value == 0 and name not in zero_allowed):
            raise ConfigError(f"{name} is {value!r}; give a number over 0")


def from_environment(config: type, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Values of `NESTED_<FIELD>` for the fields of a config dataclass, as text, by field name."""
    environ = os.environ if environ is None else environ
    names = {field.name: PREFIX + field.name.upper() for field in fields(config)}
    return {name: environ[variable] for name, variable in names.items() if variable in environ}
