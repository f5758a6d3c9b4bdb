"""/v1/sessions: the caller's own memories."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from nested_runtime.core import SamplingParams
from nested_runtime.errors import NestedError, NotFound, RequestError
from nested_runtime.models.replay import Consolidation
from nested_runtime.sessions import Turn
from nested_runtime.store.base import SessionKey, Version

from ..deps import CallerDep, Expected, Named, Service, ServiceDep, named_session
from ..schemas.bodies import Snapshot
from ..schemas.chat import text_of
from ..schemas.common import session_body
from ..schemas.sessions import (
    MAX_VERSION,
    ConsolidateRequest,
    CreateRequest,
    ForkRequest,
    LearnRequest,
    ResetRequest,
    RestoreRequest,
    SnapshotRequest,
    info_body,
    level_body,
    snapshot_body,
    version_body,
)

__all__ = ["router"]

router = APIRouter(prefix="/sessions", tags=["sessions"])


def _written(key: SessionKey, version: Version) -> JSONResponse:
    body = {"id": key.session, **version_body(version)}
    return JSONResponse(body, headers={"X-Session-Version": str(version.number)})


def absent(key: SessionKey) -> NotFound:
    """The same for a session that never was and one of another tenant."""
    return NotFound(f"session {key.session!r} does not exist; the first turn with its id creates it")


@router.get("")
async def list_sessions(
    service: ServiceDep,
    caller: CallerDep,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """The caller's sessions by id; `next` continues after a page."""
    page = await service.store.sessions(caller.tenant, cursor=cursor, limit=limit)
    return {"object": "list", "data": [info_body(info) for info in page.sessions], "next": page.cursor}


@router.post("")
async def create_session(
    request: Request, service: ServiceDep, caller: CallerDep, body: CreateRequest | None = None
) -> JSONResponse:
    """A session with a fresh memory. The first turn with a new id makes one too; this one is refused if it exists."""
    wanted = body or CreateRequest(id=None, model=None)
    key = named_session(request, wanted.id if wanted.id is not None else uuid.uuid4().hex)
    model = service.model(wanted.model if wanted.model is not None else next(iter(service.runtime.models)))
    return _written(key, await service.manager.create(key, model))


@router.get("/{id}")
async def get_session(key: Named, service: ServiceDep) -> JSONResponse:
    """Version, tokens, bytes, digest and times."""
    info = await service.store.info(key)
    if info is None:
        raise absent(key)
    return JSONResponse(info_body(info), headers={"X-Session-Version": str(info.head.number)})


@router.delete("/{id}")
async def delete_session(key: Named, service: ServiceDep, expected: Expected) -> dict[str, Any]:
    """Erase memory, snapshots, history and idempotency records, also under a running turn."""
    if not await service.manager.delete(key, expected):
        raise absent(key)
    return {"id": key.session, "object": "session.deleted", "deleted": True}


@router.post("/{id}/reset")
async def reset_session(
    key: Named, service: ServiceDep, expected: Expected, body: ResetRequest | None = None
) -> JSONResponse:
    """Make the memory, or some of its levels, fresh. The versions before stay restorable while they are kept."""
    return _written(key, await service.manager.reset(key, body.names if body else None, expected))


@router.post("/{id}/snapshot")
async def snapshot_session(
    key: Named, service: ServiceDep, expected: Expected, body: SnapshotRequest | None = None
) -> Snapshot:
    """Keep a version (the newest) until the snapshot is deleted."""
    if expected is not None:
        await service.vault.versions(key, expected)
    wanted = body or SnapshotRequest(version=None, label="")
    return snapshot_body(await service.store.snapshot(key, wanted.version or expected, wanted.label))


@router.get("/{id}/snapshots")
async def list_snapshots(key: Named, service: ServiceDep) -> dict[str, Any]:
    """The session's snapshots, oldest first."""
    await service.vault.head(key)
    return {"object": "list", "data": [snapshot_body(one) for one in await service.store.snapshots(key)]}


@router.delete("/{id}/snapshots/{snapshot}")
async def delete_snapshot(key: Named, snapshot: str, service: ServiceDep, expected: Expected) -> dict[str, Any]:
    """Forget a snapshot."""
    if not await service.manager.delete_snapshot(key, snapshot, expected):
        raise NotFound(f"session {key.session!r} has no snapshot {snapshot!r}; list its snapshots")
    return {"snapshot": snapshot, "deleted": True}


@router.post("/{id}/restore")
async def restore_session(key: Named, service: ServiceDep, expected: Expected, body: RestoreRequest) -> JSONResponse:
    """Continue from a snapshot or kept version; the versions since stay in the history."""
    version = await service.manager.restore(key, version=body.version, snapshot=body.snapshot, expect=expected)
    return _written(key, version)


@router.post("/{id}/fork")
async def fork_session(
    key: Named, service: ServiceDep, caller: CallerDep, expected: Expected, body: ForkRequest
) -> JSONResponse:
    """A new session that starts with this one's memory."""
    target = SessionKey(caller.tenant, body.id)
    return _written(target, await service.manager.fork(key, target, body.version, expected))


@router.post("/{id}/learn")
async def learn(key: Named, service: ServiceDep, expected: Expected, body: LearnRequest) -> JSONResponse:
    """Absorb text or messages without answering."""
    service.admit()
    if (body.text is None) == (body.messages is None):
        raise RequestError("give either text or messages to learn", param="text")
    if body.messages is not None:
        messages = [{"role": m.role, "content": text_of(m.content, "messages")} for m in body.messages]
    else:
        messages = [{"role": "user", "content": body.text or ""}]
    model = service.model(body.model if body.model is not None else await _model_of(service, key))
    turn = Turn(
        id=f"learn-{uuid.uuid4().hex}",
        model=model.id,
        params=SamplingParams(max_tokens=0, prompt_logprobs=0 if body.surprise else None),
        messages=tuple(messages),
        session=key,
        expect=expected,
    )
    finished = await service.runtime.absorb(turn)
    version = str(finished.session.version) if finished.session else ""
    told = session_body(finished, model.tokenizer if body.surprise else None)
    body_out = {"id": key.session, "tokens_read": finished.prompt_tokens, **told}
    return JSONResponse(body_out, headers={"X-Session-Version": version})


@router.post("/{id}/consolidate")
async def consolidate(
    key: Named, service: ServiceDep, expected: Expected, body: ConsolidateRequest | None = None
) -> JSONResponse:
    """Let slower levels learn the session's recent tokens, as a version of its own. Turns wait meanwhile."""
    service.admit()
    asked = body or ConsolidateRequest(passes=1, decay=0.0)
    rested = await service.consolidator.consolidate(key, Consolidation(asked.passes, asked.decay), expect=expected)
    if rested is None:
        raise NestedError("the consolidation gave way although it was asked for; nothing was changed")
    reply = {"id": key.session, **version_body(rested.version), "tokens_read": rested.tokens, "into": rested.levels}
    return JSONResponse(reply, headers={"X-Session-Version": str(rested.version.number)})


async def _model_of(service: Service, key: SessionKey) -> str:
    """The model of the session's memory, or the server's first one."""
    head = await service.store.head(key)
    return head.model if head is not None else next(iter(service.runtime.models))


@router.get("/{id}/history")
async def history(key: Named, service: ServiceDep) -> dict[str, Any]:
    """The kept versions, newest first."""
    await service.vault.head(key)
    return {"object": "list", "data": [version_body(one) for one in await service.store.versions(key)]}


@router.get("/{id}/levels")
async def levels(
    key: Named, service: ServiceDep, version: Annotated[int | None, Query(ge=1, le=MAX_VERSION)] = None
) -> dict[str, Any]:
    """Size, norm and clock of every memory level of a kept version, and how far it moved from the one before."""
    found, data = await service.manager.levels(key, version)
    shown = [level_body(level) for level in data]
    return {"object": "list", "version": found.number, "tokens": found.tokens, "data": shown}


@router.get("/{id}/export")
async def export_session(
    key: Named, service: ServiceDep, version: Annotated[int | None, Query(ge=1, le=MAX_VERSION)] = None
) -> Response:
    """The memory as a safetensors file that import takes back."""
    found, blob = await service.manager.export(key, version)
    headers = {
        "X-Session-Version": str(found.number),
        "X-Session-Model": found.model,
        "Content-Disposition": 'attachment; filename="session.safetensors"',
    }
    return Response(blob, media_type="application/octet-stream", headers=headers)


@router.put("/{id}/import")
async def import_session(
    request: Request, key: Named, service: ServiceDep, expected: Expected, model: str | None = None
) -> JSONResponse:
    """Make exported bytes the session's next version. Refused bytes change nothing."""
    served = service.model(model) if model is not None else service.model(await _model_of(service, key))
    return _written(key, await service.manager.import_(key, served, await request.body(), expected))
