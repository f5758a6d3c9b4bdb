"""StateCache: bounds hold, the least recently used goes first, forgetting is by key prefix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.errors import ConfigError
from nested_runtime.state.cache import StateCache


def state(count: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(count)}


def test_least_recently_used_goes_first() -> None:
    cache = StateCache(max_bytes=40)
    for name in "abc":
        cache.put((name,), state(3))
    assert cache.get(("a",)) is not None
    cache.put(("d",), state(3))
    assert [name for name in "abcd" if (name,) in cache] == ["a", "c", "d"]
    assert cache.num_bytes == 36


def test_forget_drops_one_session_and_no_other() -> None:
    cache = StateCache(max_bytes=1000)
    for key in [("t", "s", "1"), ("t", "s", "2"), ("t", "s2", "1"), ("u", "s", "1")]:
        cache.put(key, state(1))
    assert cache.forget(("t", "s")) == 2
    assert ("t", "s2", "1") in cache
    assert ("u", "s", "1") in cache
    assert len(cache) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12))), st.integers(0, 40), st.none() | st.integers(0, 3))
def test_bounds_always_hold(puts: list[tuple[int, int]], max_bytes: int, max_count: int | None) -> None:
    cache = StateCache(max_bytes, max_count)
    for key, count in puts:
        cache.put((str(key),), state(count))
        kept = [cache.get((str(key),)) for key in range(6)]
        sizes = [4 * found["x"].numel() for found in kept if found is not None]
        assert cache.num_bytes == sum(sizes) <= max_bytes
        assert len(cache) == len(sizes) <= (len(sizes) if max_count is None else max_count)


def test_negative_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="-1 bytes"):
        StateCache(-1)
