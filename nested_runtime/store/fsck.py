"""The part of fsck that is the same for every store."""

from __future__ import annotations

from nested_runtime.errors import StateError
from nested_runtime.store.base import SessionKey, StateStore

__all__ = ["check_session"]


async def check_session(store: StateStore, key: SessionKey) -> list[str]:
    """Read every version and snapshot of a session; one line per problem. Versions pruned meanwhile are no problem."""
    problems = []
    name = f"{key.tenant!r}/{key.session!r}"
    versions = await store.versions(key)
    snapshots = await store.snapshots(key)
    for version in versions:
        try:
            found = await store._load(key, version.number, None)
            if found is None:
                if version in await store.versions(key):
                    problems.append(f"{name} version {version.number}: state is missing")
            elif found[0] != version or len(found[1]) != version.size:
                problems.append(f"{name} version {version.number}: size or record differ")
            else:
                await store._unpack(key, version.number, found[1])
        except StateError as error:
            problems.append(f"{name} version {version.number}: {error}")
    kept = {version.number for version in versions}
    lost = [snapshot for snapshot in snapshots if snapshot.version not in kept]
    return problems + [f"{name} snapshot {snapshot.id}: version {snapshot.version} is missing" for snapshot in lost]
