"""Vault: where stored bytes become tensors and back. The only place that knows both the store and the codec."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from nested_runtime.backends.base import Backend
from nested_runtime.config import SessionConfig
from nested_runtime.errors import LeaseLost, NotFound, SessionBusy, StateMismatch, VersionConflict
from nested_runtime.memory.level import Level
from nested_runtime.sessions.history import Record
from nested_runtime.state import codec
from nested_runtime.state.cache import StateCache
from nested_runtime.state.snapshot import Binding, Snapshot
from nested_runtime.state.spec import TensorSpec, newest_rows
from nested_runtime.store.base import Draft, Lease, SessionKey, StateStore, StoredAnswer, Version
from nested_runtime.tokenizer import Tokenizer

__all__ = ["Encoded", "ServedModel", "Start", "Tensors", "Vault", "record_of", "zeros"]

Tensors = Mapping[str, torch.Tensor]
Observer = Callable[[str, float], None]


@dataclass(frozen=True)
class ServedModel:
    """A model of this server. `levels`: its adaptive ones, fastest first; `memory`: see `LanguageModel.memory`."""

    id: str
    backend: Backend
    tokenizer: Tokenizer
    specs: tuple[TensorSpec, ...]
    levels: tuple[Level, ...]
    memory: Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Start:
    """A state as it lies between turns: `tensors` None = fresh, `pending` is read first in the next turn.

    digest   of the tensors where they are a stored version's, else ""
    """

    tensors: Tensors | None = None
    position: int = 0
    pending: int | None = None
    digest: str = ""


@dataclass(frozen=True)
class Encoded:
    """A state ready to be stored."""

    start: Start
    blob: bytes
    digest: str


class Vault:
    """Leases, loads and commits sessions.

    observe    is told the name and value of measurements
    backends   what they have cached of a session is forgotten together with its resident copies
    """

    def __init__(
        self,
        store: StateStore,
        config: SessionConfig | None = None,
        observe: Observer = lambda _name, _value: None,
        backends: Sequence[Backend] = (),
    ) -> None:
        self.store = store
        self.backends = backends
        self.config = config or SessionConfig()
        self.residents = StateCache(self.config.resident_bytes)
        self._observe = observe
        self._waiting: Counter[SessionKey] = Counter()

    @asynccontextmanager
    async def hold(self, key: SessionKey, wait: float | None = None) -> AsyncIterator[Lease]:
        """The session's lease, renewed in the background; SessionBusy when too many wait for it, or for too long.

        wait: seconds, the configured ones if None.
        """
        if self._waiting[key] > self.config.waiting:
            raise SessionBusy(
                f"session {key.session!r} is busy and {self._waiting[key]} requests are ahead already (limit "
                f"{self.config.waiting + 1}); send one request at a time per session"
            )
        seconds = self.config.wait_seconds if wait is None else wait
        self._waiting[key] += 1
        try:
            async with self.store.hold(key, ttl=self.config.lease_seconds, wait=seconds) as lease:
                yield lease
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    def is_wanted(self, key: SessionKey) -> bool:
        """Whether somebody here waits for the lease that somebody here holds."""
        return self._waiting[key] > 1

    async def versions(self, key: SessionKey, expect: int | None = None) -> list[Version]:
        """The kept versions, newest first; VersionConflict when the head is not the expected one (If-Match)."""
        versions = await self.store.versions(key)
        head = versions[0].number if versions else 0
        if expect is not None and expect != head:
            raise VersionConflict(
                f"session {key.session!r} is at version {head}, not {expect} as If-Match says; read it and retry"
            )
        if not versions:
            self.forget(key)
        return versions

    async def head(self, key: SessionKey, expect: int | None = None) -> Version:
        """The newest version; NotFound when the session does not exist."""
        versions = await self.versions(key, expect)
        if not versions:
            raise NotFound(f"session {key.session!r} does not exist; the first turn with its id creates it")
        return versions[0]

    async def load(self, key: SessionKey, version: Version, model: ServedModel) -> Start:
        """The state of a version: the resident copy, else the stored bytes, decoded off the event loop."""
        if version.fingerprint != model.backend.fingerprint:
            raise StateMismatch(
                f"session {key.session!r} holds a memory of model {version.model!r} "
                f"(fingerprint {version.fingerprint[:12]}), which {model.id!r} ({model.backend.fingerprint[:12]}) "
                "cannot read; use that model, another session id, or delete the session"
            )
        cached = (key.tenant, key.session, version.digest)
        tensors = self.residents.get(cached)
        if tensors is None:
            began = perf_counter()
            _, blob = await self.store.load(key, version.number)
            binding = Binding(key.tenant, key.session, version.number)
            snapshot = await asyncio.to_thread(codec.decode, blob, model.specs, version.fingerprint, binding)
            tensors = snapshot.tensors
            self._observe("load_seconds", perf_counter() - began)
            self._keep(key, version.digest, tensors)
        return Start(tensors, version.tokens, version.pending, version.digest)

    async def commit(
        self,
        lease: Lease,
        parent: int,
        encoded: Encoded,
        model: ServedModel,
        *,
        kind: str,
        source: int | None = None,
        record: Record | None = None,
        answer: StoredAnswer | None = None,
    ) -> Version:
        """Store an encoded state as the next version; `source` when it does not continue the parent."""
        draft = Draft(
            kind=kind,
            tokens=encoded.start.position,
            learned_tokens=encoded.start.position,
            digest=encoded.digest,
            fingerprint=model.backend.fingerprint,
            model=model.id,
            pending=encoded.start.pending,
            source=None if source == parent else source,
            **_of_record(record),
        )
        began = perf_counter()
        try:
            version = await self.store.commit(lease, parent, encoded.blob, draft, answer)
        except LeaseLost:  # perhaps deleted meanwhile: what this turn left in caches goes, too
            self.forget(lease.key)
            raise
        self._observe("commit_seconds", perf_counter() - began)
        if encoded.start.tensors is not None:
            self._keep(lease.key, encoded.digest, encoded.start.tensors)
        return version

    async def encode(self, key: SessionKey, number: int, start: Start, model: ServedModel) -> Encoded:
        """A state as version `number` of a session, off the event loop. Continue from the tensors it returns."""
        return await asyncio.to_thread(self._encode, key, number, start, model)

    def _encode(self, key: SessionKey, number: int, start: Start, model: ServedModel) -> Encoded:
        tensors = start.tensors if start.tensors is not None else zeros(model.specs)
        snapshot = Snapshot.take(
            newest_rows(model.specs, tensors, self.config.kept_kv_bytes),
            fingerprint=model.backend.fingerprint,
            binding=Binding(key.tenant, key.session, number),
            position=start.position,
            pending=start.pending,
            at_rest=self.config.at_rest,
        )
        kept = Start(snapshot.tensors, start.position, start.pending)
        return Encoded(kept, codec.encode(snapshot), snapshot.header.digest)

    def _keep(self, key: SessionKey, digest: str, tensors: Tensors) -> None:
        self.residents.put((key.tenant, key.session, digest), tensors)

    def forget(self, key: SessionKey) -> None:
        """Drop resident copies and cached prefixes of a session."""
        self._forget((key.tenant, key.session))

    def forget_tenant(self, tenant: str | None) -> int:
        """Drop the resident copies and cached prefixes of a tenant, or all; how many copies."""
        return self._forget(() if tenant is None else (tenant,))

    def _forget(self, name: tuple[str, ...]) -> int:
        for backend in self.backends:
            backend.evict(name)
        return self.residents.forget(name)

    async def forget_deleted(self) -> None:
        """Drop copies and prefixes of what is no longer kept: another server may have erased it and reused the id."""
        names = set(self.residents)
        for backend in self.backends:
            names |= {key[:3] for key in await backend.cached() if key[1]}  # without a session: shared by the tenant
        of_session = defaultdict(list)
        for name in names:
            of_session[name[:2]].append(name)
        for (tenant, session), names_there in of_session.items():
            kept = {version.digest for version in await self.store.versions(SessionKey(tenant, session))}
            if kept:
                kept.add("")  # prefixes from the fresh state
            for name in names_there:
                if name[2] not in kept:
                    self._forget(name)


def zeros(specs: tuple[TensorSpec, ...]) -> dict[str, torch.Tensor]:
    """The fresh state."""
    return {spec.name: torch.zeros(spec.fresh_shape, dtype=spec.dtype) for spec in specs}


def _of_record(record: Record | None) -> dict[str, Any]:
    if record is None:
        return {}
    return {"chain": record.chain, "root": record.root, "messages": record.count, "extra": {"start": record.start}}


def record_of(version: Version) -> Record | None:
    """The conversation a version stands at, if a conversation wrote it."""
    if not version.chain:
        return None
    return Record(version.root, version.chain, version.messages, int(version.extra.get("start", -1)))
