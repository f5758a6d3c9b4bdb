"""SessionManager: what can be done to a session without the model answering: reset, restore, fork, export, import."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from nested_runtime.errors import Conflict, NotFound, RequestError, StateError
from nested_runtime.sessions.history import Record
from nested_runtime.sessions.levels import LevelReport, measure
from nested_runtime.sessions.vault import ServedModel, Start, Tensors, Vault, record_of, zeros
from nested_runtime.state import codec
from nested_runtime.store.base import SessionKey, Version

__all__ = ["SessionManager"]

NOWHERE = -1
"""Record.start of a conversation whose beginning lies in another session."""


class SessionManager:
    """Operations on stored sessions. Each takes the lease, so it cannot interleave with a turn.

    find   the served model of a name, raising NotFound
    """

    def __init__(self, vault: Vault, find: Callable[[str], ServedModel]) -> None:
        self.vault = vault
        self._find = find

    async def reset(self, key: SessionKey, levels: Sequence[str] | None = None, expect: int | None = None) -> Version:
        """Make all levels (None) or the named ones fresh, as a new version."""
        async with self.vault.hold(key) as lease:
            head = await self.vault.head(key, expect)
            model = self._find(head.model)
            if levels is None:
                start, source = Start(), 0
            else:
                start, source = await self._partly_fresh(key, head, model, levels), head.number
            encoded = await self.vault.encode(key, head.number + 1, start, model)
            return await self.vault.commit(lease, head.number, encoded, model, kind="reset", source=source)

    async def _partly_fresh(self, key: SessionKey, head: Version, model: ServedModel, levels: Sequence[str]) -> Start:
        known = sorted({spec.level for spec in model.specs})
        unknown = [level for level in levels if level not in known]
        if unknown or not levels:
            raise RequestError(
                f"levels {list(levels)} has none or unknown names; use some of {', '.join(known)}, or leave levels out",
                param="levels",
            )
        start = await self.vault.load(key, head, model)
        tensors = dict(start.tensors or {})
        tensors.update(zeros(tuple(spec for spec in model.specs if spec.level in levels)))
        return replace(start, tensors=tensors)

    async def restore(
        self, key: SessionKey, *, version: int | None = None, snapshot: str | None = None, expect: int | None = None
    ) -> Version:
        """Continue from a kept version or a snapshot: its state becomes the next version. Nothing is lost by it."""
        async with self.vault.hold(key) as lease:
            head = await self.vault.head(key, expect)
            wanted = await self._wanted(key, version, snapshot)
            model = self._find(wanted.model)
            encoded = await self.vault.encode(key, head.number + 1, await self.vault.load(key, wanted, model), model)
            record = record_of(wanted)
            return await self.vault.commit(
                lease, head.number, encoded, model, kind="restore", source=wanted.number, record=record
            )

    async def _wanted(self, key: SessionKey, version: int | None, snapshot: str | None) -> Version:
        if (version is None) == (snapshot is None):
            raise RequestError("give either a version or a snapshot to restore", param="snapshot")
        if snapshot is not None:
            found = [s.version for s in await self.vault.store.snapshots(key) if s.id == snapshot]
            if not found:
                raise NotFound(f"session {key.session!r} has no snapshot {snapshot!r}; list its snapshots")
            version = found[0]
        return await self.version(key, version)

    async def version(self, key: SessionKey, number: int | None = None, expect: int | None = None) -> Version:
        """A kept version, the head when None; NotFound otherwise."""
        head = await self.vault.head(key, expect)
        if number is None:
            return head
        for version in await self.vault.store.versions(key):
            if version.number == number:
                return version
        raise NotFound(f"session {key.session!r} has no version {number} (never written, or no longer kept)")

    async def create(self, key: SessionKey, model: ServedModel) -> Version:
        """A session that has read nothing yet; Conflict when it exists."""
        return await self._create(key, Start(), model, kind="create")

    async def fork(
        self, key: SessionKey, target: SessionKey, number: int | None = None, expect: int | None = None
    ) -> Version:
        """A new session with the state of a version of this one; Conflict when `target` exists."""
        source = await self.version(key, number, expect)
        model = self._find(source.model)
        start = await self.vault.load(key, source, model)
        return await self._create(target, start, model, kind="fork", record=_uprooted(record_of(source)))

    async def _create(
        self, key: SessionKey, start: Start, model: ServedModel, *, kind: str, record: Record | None = None
    ) -> Version:
        async with self.vault.hold(key) as lease:
            if await self.vault.versions(key):
                raise Conflict(f"session {key.session!r} exists already; choose another id or delete it first")
            encoded = await self.vault.encode(key, 1, start, model)
            return await self.vault.commit(lease, 0, encoded, model, kind=kind, record=record)

    async def export(self, key: SessionKey, number: int | None = None) -> tuple[Version, bytes]:
        """A version as the bytes that `import_` accepts: a safetensors file."""
        version = await self.version(key, number)
        _, blob = await self.vault.store.load(key, version.number)
        return version, blob

    async def import_(self, key: SessionKey, model: ServedModel, blob: bytes, expect: int | None = None) -> Version:
        """Make exported bytes the session's next version. Refused bytes change nothing."""
        fingerprint = model.backend.fingerprint
        snapshot = await asyncio.to_thread(codec.decode, blob, model.specs, fingerprint)
        start = Start(snapshot.tensors, snapshot.header.position, snapshot.header.pending)
        if start.pending is not None and start.pending >= model.tokenizer.vocab_size:
            raise StateError(f"state blob: pending token {start.pending} is not in the vocabulary of {model.id!r}")
        async with self.vault.hold(key) as lease:
            versions = await self.vault.versions(key, expect)
            parent = versions[0].number if versions else 0
            encoded = await self.vault.encode(key, parent + 1, start, model)
            return await self.vault.commit(lease, parent, encoded, model, kind="import", source=0)

    async def delete(self, key: SessionKey, expect: int | None = None) -> bool:
        """Erase the session, also under a running turn, which then cannot commit.

        With `expect` it waits for that turn, and erases only if nothing was learned since that version.
        """
        if expect is None:
            existed = await self.vault.store.delete(key)
        else:
            async with self.vault.hold(key):
                await self.vault.versions(key, expect)
                existed = await self.vault.store.delete(key)
        self.vault.forget(key)
        return existed

    async def delete_snapshot(self, key: SessionKey, snapshot: str, expect: int | None = None) -> bool:
        """Forget a snapshot, and its version if nothing else keeps it. False if there was none."""
        if expect is None:
            return await self.vault.store.delete_snapshot(key, snapshot)
        async with self.vault.hold(key):
            await self.vault.versions(key, expect)
            return await self.vault.store.delete_snapshot(key, snapshot)

    async def levels(self, key: SessionKey, number: int | None = None) -> tuple[Version, list[LevelReport]]:
        """The memory levels of a kept version, the head when None, beside the version it was made from."""
        version = await self.version(key, number)
        model = self._find(version.model)
        state = (await self.vault.load(key, version, model)).tensors or zeros(model.specs)
        before = await self._before(key, version, model)
        return version, await asyncio.to_thread(measure, model.specs, model.levels, model.memory, state, before)

    async def _before(self, key: SessionKey, version: Version, model: ServedModel) -> Tensors | None:
        """The state a version was made from; None when that version is no longer kept, or is another session's."""
        number = version.source if version.source is not None else version.parent
        if not number:
            return None if version.kind in ("fork", "import") else zeros(model.specs)
        source = next((one for one in await self.vault.store.versions(key) if one.number == number), None)
        if source is None or source.fingerprint != version.fingerprint:
            return None
        return (await self.vault.load(key, source, model)).tensors


def _uprooted(record: Record | None) -> Record | None:
    return None if record is None else replace(record, start=NOWHERE)
