"""Traces: one span per request and in it what it waited for, sent to an OTLP collector. Needs the extra `otel`.

Spans hold route, status and the same (hashed) ids as the log lines, never text. A `traceparent` header is continued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nested_runtime.errors import ConfigError

__all__ = ["NoTracing", "Note", "Tracing", "tracing_to"]

Note = Callable[[Mapping[str, Any]], None]
"""Called at a request's end with what the log line says."""

EXPORT_SECONDS = 5  # how long a collector may take, also at the server's end
CHILDREN = {"load_seconds": "memory.load", "commit_seconds": "memory.commit"}


class NoTracing:
    """What a server without a collector uses: nothing happens."""

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Iterator[Note]:
        """A span around a request."""
        yield lambda said: None

    def measured(self, name: str, seconds: float) -> None:
        """Something inside the present request that ended now and took `seconds`."""

    def event(self, name: str) -> None:
        """A moment of the present request."""

    def close(self) -> None:
        """Send what is left."""


class Tracing(NoTracing):
    """Spans to the collector at `endpoint`, such as http://127.0.0.1:4318."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"--otlp-endpoint needs the extra otel ({error}); pip install -e '.[otel]'") from None
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"--otlp-endpoint is {endpoint!r}; write http://host:4318")
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self._provider = TracerProvider(resource=Resource.create({"service.name": "nested-serve"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nested")
        self._trace, self._propagate = trace, propagate

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Iterator[Note]:
        """See NoTracing."""
        kind, parent = self._trace.SpanKind.SERVER, self._propagate.extract(headers)
        with self._tracer.start_as_current_span(
            "request",
            parent,
            kind,
            record_exception=False,
            set_status_on_exception=False,  # its text may quote the user
        ) as span:

            def note(said: Mapping[str, Any]) -> None:
                span.update_name(f"{said['method']} {said['route']}")
                span.set_attributes(
                    {
                        "http.request.method": said["method"],
                        "http.route": said["route"],
                        "http.response.status_code": said["status"],
                        **{f"nested.{name}": said[name] for name in ("request", "tenant", "session")},
                    }
                )
                if said["status"] >= 500:
                    span.set_status(self._trace.StatusCode.ERROR)

            yield note

    def measured(self, name: str, seconds: float) -> None:
        """See NoTracing."""
        if name in CHILDREN and self._trace.get_current_span().is_recording():
            now = time.time_ns()
            self._tracer.start_span(CHILDREN[name], start_time=now - round(seconds * 1e9)).end(now)

    def event(self, name: str) -> None:
        """See NoTracing."""
        self._trace.get_current_span().add_event(name)

    def close(self) -> None:
        """See NoTracing."""
        self._provider.shutdown()


def tracing_to(endpoint: str | None) -> NoTracing:
    """Traces to a collector, or none."""
    return NoTracing() if endpoint is None else Tracing(endpoint)
