"""Idempotency for requests that commit nothing: answers of the last minutes, in this process only.

Turns that learn keep their answer in the store, in the same atomic commit as the memory (see sessions/runtime.py).
"""

from __future__ import annotations

from collections import OrderedDict

from nested_runtime.errors import Conflict, RequestError

__all__ = ["AnswerCache"]

MAX_BYTES = 16 << 20


class AnswerCache:
    """(tenant, key) -> (body digest, answer), the oldest dropped first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._answers: OrderedDict[tuple[str, str], tuple[str, bytes]] = OrderedDict()
        self._running: set[tuple[str, str]] = set()

    def begin(self, tenant: str, key: str, body_digest: str) -> bytes | None:
        """The stored answer, or None: then say `end` later. Conflict while running, RequestError for another body."""
        mark = (tenant, key)
        if mark in self._answers:
            digest, answer = self._answers[mark]
            if digest != body_digest:
                raise RequestError(
                    f"Idempotency-Key {key!r} was used with another request body; take a new key for a new request",
                    param="Idempotency-Key",
                    code="idempotency_key_reused",
                )
            return answer
        if mark in self._running:
            raise Conflict(f"the request with Idempotency-Key {key!r} is still running; wait for its answer and retry")
        self._running.add(mark)
        return None

    def end(self, tenant: str, key: str, body_digest: str, answer: bytes | None) -> None:
        """The request is over, with an answer worth keeping or (None) without."""
        self._running.discard((tenant, key))
        if answer is None or len(answer) > self._max_bytes:
            return
        self._answers[tenant, key] = (body_digest, answer)
        self._num_bytes += len(answer)
        while self._num_bytes > self._max_bytes:
            _, (_, dropped) = self._answers.popitem(last=False)
            self._num_bytes -= len(dropped)

    def forget(self, tenant: str) -> None:
        """Drop a tenant's answers."""
        for mark in [mark for mark in self._answers if mark[0] == tenant]:
            _, dropped = self._answers.pop(mark)
            self._num_bytes -= len(dropped)
