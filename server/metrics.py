"""Prometheus metrics: vLLM's names under our prefix, and what is special about memories."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Metrics"]

PREFIX = "nested_"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# metric -> (key of Backend.stats(), what it is)
GAUGES = {
    "num_requests_running": ("running", "sequences in slots"),
    "num_requests_waiting": ("waiting", "sequences waiting for a slot"),
    "slots_free": ("slots_free", "slots nobody uses"),
    "prefix_cache_bytes": ("prefix_bytes", "bytes of cached prompt prefixes"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "prompt tokens read"),
    "generation_tokens": ("sampled_tokens", "tokens sampled"),
    "prefix_cache_queries": ("prefix_queries", "prompts looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_hits", "prompts found in the prefix cache"),
    "num_preemptions": ("preemptions", "sequences that gave way (never: a state has a fixed size)"),
    "memory_updates": ("updates", "update jobs of slow levels"),
    "memory_updates_refused": ("updates_refused", "updates that diverged: the levels stayed as they were"),
}

Stats = Callable[[], Iterable[tuple[str, dict[str, Any]]]]


class Metrics:
    """All metrics of one server. `stats` gives (model id, Backend.stats()), `resident` (states, bytes) in memory."""

    def __init__(self, stats: Stats, resident: Callable[[], tuple[int, int]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Live(stats, resident))
        self.requests = self._counter("requests", "finished HTTP requests", "route", "status")
        self.conflicts = self._counter("memory_conflicts", "requests refused with a conflict", "code")
        self.first_token = self._histogram("time_to_first_token_seconds", "request to first token", "model")
        self.between_tokens = self._histogram("inter_token_latency_seconds", "token to token", "model")
        self.whole = self._histogram("e2e_request_latency_seconds", "request to finished reply", "model")
        self._measured = {
            "load_seconds": self._histogram("memory_load_seconds", "reading a state from the store"),
            "commit_seconds": self._histogram("memory_commit_seconds", "writing a state to the store"),
            "update_seconds": self._histogram("memory_update_seconds", "an update of a slow level"),
            "update_norm": self._histogram("update_norm", "norm of an update of a slow level"),
        }

    def observe(self, name: str, value: float) -> None:
        """Told by the vault and by engines, whose threads differ: the histograms are made for that."""
        self._measured[name].observe(value)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, *labels: str) -> Histogram:
        return Histogram(PREFIX + name, about, labels, buckets=SECONDS, registry=self.registry)


class _Live(Collector):
    """Numbers that are read when asked for."""

    def __init__(self, stats: Stats, resident: Callable[[], tuple[int, int]]) -> None:
        self._stats = stats
        self._resident = resident

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        stats = list(self._stats())
        for name, (key, about) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, about, labels=["model"])
            for model, values in stats:
                gauge.add_metric([model], float(values.get(key, 0)))
            yield gauge
        for name, (key, about) in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, about, labels=["model"])
            for model, values in stats:
                counter.add_metric([model], float(values.get(key, 0)))
            yield counter
        count, size = self._resident()
        yield GaugeMetricFamily(PREFIX + "sessions_resident", "sessions whose state is in memory", value=float(count))
        yield GaugeMetricFamily(PREFIX + "memory_bytes", "bytes of states in memory", value=float(size))
