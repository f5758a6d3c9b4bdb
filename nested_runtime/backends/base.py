"""Backend: the seam between sessions and whatever runs the model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from nested_runtime.core import Sequence, TokenEvent

__all__ = ["Backend"]


class Backend(Protocol):
    """Runs sequences of one model. asyncio-side methods; the engine itself is synchronous and owns its thread."""

    model_id: str
    fingerprint: str  # of config + weights: bound into every state blob
    max_context: int  # tokens a single turn may read + write

    async def start(self) -> None:
        """Load, warm up, begin stepping."""

    def submit(self, sequence: Sequence) -> AsyncIterator[TokenEvent]:
        """Queue a sequence; iterate its events. Closing the iterator early aborts the sequence."""

    def abort(self, sequence_id: str) -> None:
        """Stop a sequence at the next step; its slot is zeroed, no state is returned. Unknown ids are ignored."""

    async def drain(self, deadline: float) -> None:
        """Refuse new work, let running sequences finish until `deadline` seconds from now, abort the rest, stop."""

    def stats(self) -> dict[str, Any]:
        """Counters and gauges for /metrics and /admin/stats."""

    def evict(self, prefix: tuple[str, ...]) -> int:
        """Forget what is cached under keys that start with `prefix`, the tenant first; () = everything."""

    async def cached(self) -> list[tuple[str, ...]]:
        """The keys of what is cached, in the form that `evict` takes."""

    async def check(self) -> list[str]:
        """Look whether the working memory is in order; one line per problem, empty = healthy."""
