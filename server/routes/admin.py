"""/admin: all sessions of all tenants, behind the admin key; off when none is configured."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Query

from nested_runtime.errors import NotFound
from nested_runtime.store.base import SessionKey

from ..deps import Service, ServiceDep
from ..schemas.sessions import info_body, version_body

__all__ = ["router"]

router = APIRouter(prefix="/admin", tags=["admin"])
DRAIN_STEP = 0.05


@router.get("/stats")
async def stats(service: ServiceDep) -> dict[str, Any]:
    """Engines, resident states and what the store holds."""
    usage = await service.store.usage()
    return {
        "models": {model.id: model.backend.stats() for model in service.runtime.models.values()},
        "resident": {"states": len(service.vault.residents), "bytes": service.vault.residents.num_bytes},
        "store": {
            "durability": service.store.durability,
            "sessions": usage.sessions,
            "versions": usage.versions,
            "snapshots": usage.snapshots,
            "bytes": usage.bytes,
        },
        "accepting": service.ready,
    }


@router.get("/sessions")
async def list_all(
    service: ServiceDep,
    tenant: str | None = None,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Sessions of one tenant, or of all."""
    page = await service.store.sessions(tenant, cursor=cursor, limit=limit)
    data = [{"tenant": info.key.tenant, **info_body(info)} for info in page.sessions]
    return {"object": "list", "data": data, "next": page.cursor}


@router.get("/tenants/{tenant}/sessions/{id}")
async def show(tenant: str, id: str, service: ServiceDep) -> dict[str, Any]:
    """One session with its kept versions."""
    key = _key(tenant, id)
    info = await service.store.info(key)
    if info is None:
        raise NotFound(f"tenant {key.tenant!r} has no session {key.session!r}; list its sessions")
    versions = [version_body(version) for version in await service.store.versions(key)]
    return {"tenant": key.tenant, **info_body(info), "history": versions}


@router.delete("/tenants/{tenant}/sessions/{id}")
async def delete(tenant: str, id: str, service: ServiceDep) -> dict[str, Any]:
    """Erase one session."""
    return {"deleted": int(await service.manager.delete(_key(tenant, id)))}


@router.delete("/tenants/{tenant}")
async def erase(tenant: str, service: ServiceDep, prefix: Annotated[str, Query(max_length=256)] = "") -> dict[str, Any]:
    """Erase a tenant's sessions, or those whose id begins exactly with `prefix`. Never a pattern.

    Without a prefix also what is kept of its memoryless requests: cached prompt prefixes and answers.
    """
    tenant = unquote(tenant)
    if not prefix:
        deleted = await service.store.erase(tenant)
        service.answers.forget(tenant)
        service.vault.forget_tenant(tenant)
        return {"deleted": deleted}
    found: list[SessionKey] = []
    cursor: str | None = None
    while True:
        page = await service.store.sessions(tenant, cursor=cursor)
        found += [info.key for info in page.sessions if info.key.session.startswith(prefix)]
        cursor = page.cursor
        if cursor is None:
            break
    return {"deleted": sum([await service.manager.delete(key) for key in found])}


@router.post("/evict")
async def evict(service: ServiceDep, tenant: str | None = None) -> dict[str, Any]:
    """Drop resident states and cached prompts (of one tenant); they are read or made again when needed."""
    return {"evicted": service.vault.forget_tenant(tenant)}


@router.post("/flush")
async def flush(service: ServiceDep) -> dict[str, Any]:
    """Every turn is committed before it is answered, so there is never anything left to write: checks the store."""
    await service.store.ping()
    return {"unwritten": 0, "durability": service.store.durability}


@router.post("/drain")
async def drain(service: ServiceDep, seconds: Annotated[float, Query(ge=0, le=600)] = 20.0) -> dict[str, Any]:
    """Take no more turns and wait for the running ones; /ready says no from now on."""
    service.ready = False
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while _working(service) and loop.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(DRAIN_STEP)  # nothing announces that all engines are idle
    return {"running": _working(service)}


@router.post("/fsck")
async def fsck(service: ServiceDep) -> dict[str, Any]:
    """Check everything stored, checksums included, and every slot of the engines."""
    problems = await service.store.fsck()
    for model in service.runtime.models.values():
        problems += await model.backend.check()
    return {"healthy": not problems, "problems": problems}


def _key(tenant: str, id: str) -> SessionKey:
    """Of a path, where the middleware left %2F and %25 as they were."""
    return SessionKey(unquote(tenant), unquote(id))


def _working(service: Service) -> int:
    stats = [model.backend.stats() for model in service.runtime.models.values()]
    return sum(int(one.get("running", 0)) + int(one.get("waiting", 0)) for one in stats)
