"""open_store: the store named by a URL."""

from __future__ import annotations

from typing import Any

from nested_runtime.errors import ConfigError
from nested_runtime.registry import STORES
from nested_runtime.store.base import StateStore

__all__ = ["open_store"]


def open_store(url: str, **options: Any) -> StateStore:
    """The (not yet opened) store of `memory:`, `sqlite:///path`, `redis://host:port/db` or `rediss://...`.

    `options` are StateStore's: limits, ttl, answer_ttl, clock. Use it as `async with open_store(url) as store`.
    """
    scheme, colon, _ = url.partition(":")
    if not colon or scheme not in STORES:
        raise ConfigError(f"store URL {url!r} has no known scheme; use one of {', '.join(f'{s}:' for s in STORES)}")
    store = STORES.get(scheme).from_url(url, **options)
    if not isinstance(store, StateStore):
        raise ConfigError(f"the store registered as {scheme!r} is a {type(store).__name__}, not a StateStore")
    return store
