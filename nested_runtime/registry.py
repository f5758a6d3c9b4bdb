"""Lazy registries: a name maps to "module:attribute", imported on first use.

A stranger registers a rule, store, model family or optimizer exactly as the built-ins are:

    RULES.register("my-rule", "my_package.my_rule:MyRule")
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from nested_runtime.errors import ConfigError

__all__ = ["FAMILIES", "OPTIMIZERS", "RULES", "STORES", "Registry"]


class Registry:
    """Names of one kind of thing, resolved lazily."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._targets = dict(entries)

    def register(self, name: str, target: str) -> None:
        """Add `name` -> "module:attribute". A name can be registered once, or again with the same target."""
        known = self._targets.get(name, target)
        if known != target:
            raise ConfigError(f"{self.kind} {name!r} is already registered as {known}; choose another name")
        self._targets[name] = target

    def get(self, name: str) -> Any:
        """Return the object registered as `name`; ConfigError lists the known names otherwise."""
        if name not in self._targets:
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._targets))}")
        module, _, attribute = self._targets[name].partition(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        return name in self._targets


RULES = Registry(
    "update rule",
    {
        "gated-delta": "nested_runtime.memory.gated_delta:GatedDelta",
        "self-modifying": "nested_runtime.memory.self_modifying:SelfModifying",
        "deep-self-modifying": "nested_runtime.memory.deep:DeepSelfModifying",
        "sliding-attention": "nested_runtime.memory.attention:SlidingAttention",
        "titans": "nested_runtime.memory.titans:Titans",
        "varied-self-modifying": "nested_runtime.memory.varied:VariedSelfModifying",
    },
)
FAMILIES = Registry(
    "model family",
    {
        "delta": "nested_runtime.models.linear:DeltaModel",
        "hope": "nested_runtime.models.hope:Hope",
        "hope-attention": "nested_runtime.models.hope_attention:HopeAttention",
        "titans": "nested_runtime.models.linear:TitansModel",
        "transformer": "nested_runtime.models.transformer:Transformer",
    },
)
STORES = Registry(
    "store",
    {
        "memory": "nested_runtime.store.memory:MemoryStore",
        "sqlite": "nested_runtime.store.sqlite:SqliteStore",
        "redis": "nested_runtime.store.redis:RedisStore",
        "rediss": "nested_runtime.store.redis:RedisStore",
    },
)
OPTIMIZERS = Registry(
    "optimizer",
    {
        "gd": "nested_runtime.optim.gd:GradientDescent",
        "momentum": "nested_runtime.optim.momentum:Momentum",
        "dgd": "nested_runtime.optim.dgd:DeltaGradientDescent",
        "delta-momentum": "nested_runtime.optim.delta_momentum:DeltaMomentum",
        "deep-momentum": "nested_runtime.optim.deep_momentum:DeepMomentum",
        "adam": "nested_runtime.optim.adam:Adam",
        "muon": "nested_runtime.optim.muon:Muon",
        "m3": "nested_runtime.optim.m3:M3",
    },
)
