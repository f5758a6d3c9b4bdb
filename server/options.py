"""The command line of nested-serve as Settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from nested_runtime.config import EngineConfig, SessionConfig, from_environment
from nested_runtime.errors import ConfigError
from nested_runtime.store.base import Limits

from .settings import Settings

__all__ = ["parse"]

DEFAULT_MODEL = "hope-nano"


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of printing usage: one clear line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (nested-serve --help lists the options)")


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Settings from arguments; NESTED_<FIELD> variables give defaults of engine and session settings."""
    given = vars(_parser().parse_args(argv))
    engine, sessions, limits = (_part(kind, given) for kind in (EngineConfig, SessionConfig, Limits))
    models = tuple(given.pop("model") or (DEFAULT_MODEL,))
    origins = tuple(given.pop("cors_origin") or ())
    return Settings(
        models=models,
        cors_origins=origins,
        engine=EngineConfig(**engine),
        sessions=SessionConfig(**sessions),
        limits=Limits(**limits),
        **{name: value for name, value in given.items() if value is not None},
    )


def _part(config: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config: arguments (taken out of `given`) first, then the environment; the rest has defaults."""
    defaults = config()
    values: dict[str, Any] = {}
    for name, text in from_environment(config).items():
        kind = type(getattr(defaults, name))
        try:
            values[name] = kind(text)
        except ValueError:
            raise ConfigError(f"environment variable NESTED_{name.upper()} is {text!r}, not a number") from None
    named = {field.name: given.pop(field.name, None) for field in fields(config)}
    return values | {name: value for name, value in named.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nested-serve", description="Serve models with a memory per session over OpenAI's API.")
    add = parser.add_argument
    add("--model", action="append", metavar="PATH|NAME", help=f"checkpoint; repeatable (default {DEFAULT_MODEL})")
    add("--store", metavar="URL", help="memory: | sqlite:///path | redis://host:port/0 (default: SQLite in --data-dir)")
    add("--data-dir", type=Path, metavar="DIR", help="where the default store lies (default ~/.nested)")
    add("--backend", choices=("native", "vllm"), help="what runs the models (default native)")
    add("--ray-replicas", type=int, metavar="N", help="N of these servers under Ray Serve (extra: ray; needs Redis)")
    add("--host", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, help="port, 0 = any free one (default 8000)")
    add("--uds", metavar="PATH", help="listen on a Unix socket instead")
    add("--api-key-file", type=Path, metavar="FILE", help="lines of `tenant key`; without it only loopback is allowed")
    add("--admin-key-file", type=Path, metavar="FILE", help="keys of the admin API, which is off without them")
    add("--insecure", action="store_true", help="allow other addresses without API keys")
    add("--slots", type=int, help="sequences worked on at the same time (default 16)")
    add("--max-batch-tokens", type=int, help="tokens of an engine step (default 512)")
    add("--max-context", type=int, help="tokens one turn may read and write (default 32768)")
    add("--update-share", type=float, metavar="X", help="time for updates of levels, in decode steps (default 1.5)")
    add("--threads", type=int, help="torch threads (default: torch's choice)")
    add("--quantize", choices=("none", "int8"), help="int8: products of HOPE, frozen weights of others (default none)")
    add("--at-rest", choices=("exact", "bf16"), help="how states are stored (default exact)")
    add("--session-ttl", type=float, metavar="SECONDS", help="idle sessions are deleted after this (default never)")
    add("--notice-seconds", type=float, help="how long SIGTERM serves on while /ready says no (default 0)")
    add("--drain-seconds", type=float, help="how long SIGTERM then waits for running turns (default 20)")
    add("--consolidate-after", type=float, metavar="S", help="consolidate idle sessions when idle (default 0: never)")
    add("--consolidate-decay", type=float, metavar="X", help="what faster levels lose then, 0 to 1 (default 0)")
    by_environment = "NESTED_<NAME> sets them too, but for max-body-bytes, requests-in-flight and sweep-seconds"
    _add_limits(parser.add_argument_group("limits", by_environment))
    add("--log-ids", action="store_true", help="log tenant and session ids in plain text instead of hashes")
    add("--log-format", choices=("text", "json"), help="json: one object a line (default text)")
    add("--otlp-endpoint", metavar="URL", help="send traces to this OpenTelemetry collector (extra: otel)")
    add("--no-web", dest="web", action="store_false", default=None, help="do not serve the web page at /")
    add(
        "--check", action="store_true", default=None, help="say as JSON what would run (kernels, GPU, store), then exit"
    )
    add("--root-path", metavar="PATH", help="path prefix a proxy strips")
    add("--cors-origin", action="append", metavar="ORIGIN", help="allowed browser origin; repeatable")
    add("--ssl-keyfile", metavar="FILE")
    add("--ssl-certfile", metavar="FILE")
    add("--ssl-keyfile-password", metavar="TEXT")
    add("--ssl-ca-certs", metavar="FILE")
    return parser


def _add_limits(group: argparse._ArgumentGroup) -> None:
    """Bounds of requests, of what is stored, and of how long things are waited for."""
    add = group.add_argument
    add("--max-body-bytes", type=int, metavar="N", help="larger request bodies are 413 (default 8 MiB)")
    add("--requests-in-flight", type=int, metavar="N", help="requests of a tenant at a time, then 429 (default 256)")
    add("--queue", type=int, metavar="N", help="sequences that wait for a slot, then 429 (default 256)")
    add("--waiting", type=int, metavar="N", help="turns that wait for one session, then 409 (default 8)")
    add("--wait-seconds", type=float, metavar="S", help="how long they wait before 409 (default 30)")
    add("--lease-seconds", type=float, metavar="S", help="a server that stops for longer is fenced (default 30)")
    add("--resident-bytes", type=int, metavar="N", help="memory for states of idle sessions (default 256 MiB)")
    add(
        "--kv-bytes",
        type=int,
        metavar="N",
        help="keys and values of running sequences, attention models (default 1 GiB)",
    )
    add("--kept-kv-bytes", type=int, metavar="N", help="of them kept with a session, 0 = none (default 64 MiB)")
    add("--sessions-per-tenant", type=int, metavar="N", help="then 429 (default 100000)")
    add("--bytes-per-session", type=int, metavar="N", help="all kept versions together (default 512 MiB)")
    add("--snapshots-per-session", type=int, metavar="N", help="(default 32)")
    add("--retain", type=int, metavar="N", help="versions kept beside those of snapshots (default 8)")
    add("--sweep-seconds", type=float, metavar="S", help="how often expired sessions are erased (default 60)")
