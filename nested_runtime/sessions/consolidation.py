"""Levels at rest: recent tokens move into slower levels while nobody speaks to the session.

A consolidation holds the session's lease, so no turn runs meanwhile, on this server or another. It becomes a version of
its own, kind "consolidate", which can be restored from like any other; a server that dies on the way leaves the session
as it was. On request it runs to its end, while turns wait. In the background it begins when the server is idle, and a
turn that comes to this server has to wait for one piece of it at most; then it is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nested_runtime.backends.native import NativeBackend
from nested_runtime.errors import NotFound, RequestError, SessionBusy
from nested_runtime.models.replay import Consolidation
from nested_runtime.sessions.vault import ServedModel, Start, Vault, record_of, zeros
from nested_runtime.store.base import SessionKey, Version

__all__ = ["Consolidator", "Rested"]

KIND = "consolidate"


@dataclass(frozen=True)
class Rested:
    """What came of a consolidation: the new version, the tokens read again, the levels that learned them."""

    version: Version
    tokens: int
    levels: list[str]


class Consolidator:
    """Consolidates sessions. `find`: the served model of a name, raising NotFound."""

    def __init__(self, vault: Vault, find: Callable[[str], ServedModel]) -> None:
        self.vault = vault
        self._find = find

    async def consolidate(
        self, key: SessionKey, wanted: Consolidation, *, expect: int | None = None, gives_way: bool = False
    ) -> Rested | None:
        """Consolidate a session; None if it `gives_way` and a turn came. RequestError: there is nothing to learn."""
        async with self.vault.hold(key, 0.0 if gives_way else None) as lease:
            head = await self.vault.head(key, expect)
            model = self._find(head.model)
            backend = model.backend
            if not model.levels or not isinstance(backend, NativeBackend):
                raise RequestError(
                    f"model {model.id!r} has no levels that learn here, so there is nothing to consolidate"
                )
            start = await self.vault.load(key, head, model)

            def stop() -> bool:
                return gives_way and (self.vault.is_wanted(key) or is_busy(model))

            tensors = start.tensors if start.tensors is not None else zeros(model.specs)
            done = await backend.consolidate(tensors, wanted, stop)
            if done is None:
                return None
            if done.tokens < 2:
                raise RequestError(
                    f"session {key.session!r} keeps {done.tokens} recent tokens and 2 are needed; a model keeps those "
                    "of the unfinished chunk, and as many before them as `recent` in its config says"
                )
            number = head.number + 1
            kept = Start(done.state, start.position, start.pending)
            encoded = await self.vault.encode(key, number, kept, model)
            version = await self.vault.commit(
                lease, head.number, encoded, model, kind=KIND, record=record_of(head), source=head.number
            )
            return Rested(version, done.tokens, done.levels)

    async def rest(self, idle_seconds: float, wanted: Consolidation) -> int:
        """Consolidate the sessions used here that have been idle for so long; how many. Ends when a turn comes."""
        count = 0
        for tenant, session in dict.fromkeys((name[0], name[1]) for name in self.vault.residents):
            key = SessionKey(tenant, session)
            head = await self.vault.store.head(key)
            if head is None or head.kind == KIND or time.time() - head.created < idle_seconds:
                continue
            try:
                model = self._find(head.model)
                if not model.levels or is_busy(model):
                    continue
                count += await self.consolidate(key, wanted, expect=head.number, gives_way=True) is not None
            except (NotFound, RequestError, SessionBusy):
                continue  # it is gone, has nothing to learn, or is in use elsewhere
        return count


def is_busy(model: ServedModel) -> bool:
    """Whether the model has sequences to run."""
    stats = model.backend.stats()
    return bool(stats["running"] or stats["waiting"])
