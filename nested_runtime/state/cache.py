"""StateCache: a bounded LRU of host copies of session states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch

from nested_runtime.errors import ConfigError

__all__ = ["StateCache"]

State = Mapping[str, torch.Tensor]


class StateCache:
    """States by key, the least recently used dropped first. Keys are tuples of strings, most general part first.

    A stored state is shared, never copied: nobody may write to it. Not thread-safe.
    """

    def __init__(self, max_bytes: int, max_count: int | None = None) -> None:
        if max_bytes < 0 or (max_count is not None and max_count < 0):
            raise ConfigError(f"a state cache needs limits >= 0, got {max_bytes} bytes, {max_count} states")
        self.max_bytes = max_bytes
        self.max_count = max_count
        self.num_bytes = 0
        self._states: OrderedDict[tuple[str, ...], State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._states

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(list(self._states))

    def get(self, key: tuple[str, ...]) -> State | None:
        """The state stored under `key`, now the most recently used; None if there is none."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: tuple[str, ...], state: State) -> None:
        """Store `state` and drop old ones until the limits hold; one larger than the limits is not kept."""
        self._drop(key)
        if _bytes(state) > self.max_bytes:
            return
        self._states[key] = state
        self.num_bytes += _bytes(state)
        while self._states and self._is_over():
            self._drop(next(iter(self._states)))

    def forget(self, prefix: tuple[str, ...]) -> int:
        """Drop every state whose key starts with `prefix`; returns how many."""
        keys = [key for key in self._states if key[: len(prefix)] == prefix]
        for key in keys:
            self._drop(key)
        return len(keys)

    def _is_over(self) -> bool:
        too_many = self.max_count is not None and len(self._states) > self.max_count
        return too_many or self.num_bytes > self.max_bytes

    def _drop(self, key: tuple[str, ...]) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self.num_bytes -= _bytes(state)


def _bytes(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
