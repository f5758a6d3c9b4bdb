"""/v1/responses: `previous_response_id` is the version after that response, so branching is free.

A stored response is the idempotency record of the turn that made it: it is written in the same atomic commit as the
memory and lives as long as such records do. Without a session id a stored response begins a session of its own.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from nested_runtime.errors import Conflict, NotFound, RequestError
from nested_runtime.sessions import Turn
from nested_runtime.store.base import SessionKey

from ..deps import Caller, CallerDep, Expected, Service, ServiceDep, session_key
from ..exchange import Exchange
from ..schemas.common import known_but_unsupported
from ..schemas.responses import ResponseReply, ResponsesRequest, parse_id, response_id

__all__ = ["router"]

router = APIRouter(prefix="/responses", tags=["responses"])
OWN = "response-"  # sessions that exist only for their responses


@dataclass(frozen=True)
class Kept:
    """A stored response."""

    key: SessionKey
    version: int
    body: dict[str, Any]
    items: list[dict[str, str]]


@router.post("")
async def create_response(
    request: Request, body: ResponsesRequest, service: ServiceDep, caller: CallerDep, expected: Expected
) -> Response:
    """Answer the input, continuing a previous response's memory if one is named."""
    known_but_unsupported(body)
    model = service.model(body.model)
    if (body.n or 1) != 1:
        raise RequestError("a response has one answer; leave n out", param="n")
    named = session_key(request, body.session_id)
    previous = await _kept(service, caller, body.previous_response_id) if body.previous_response_id else None
    if named is not None and previous is not None and named != previous.key:
        raise RequestError("previous_response_id belongs to another session", param="previous_response_id")
    stores = body.store is not False
    nonce = _nonce(request, body, caller)
    key = previous.key if previous is not None else named
    if key is None and stores:
        key = SessionKey(caller.tenant, f"{OWN}{nonce}")
    if not stores and named is None:
        body.memory = body.memory.model_copy(update={"learn": "off"})
    items = body.items()
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    reply = ResponseReply(response_id(key.session if key else "", nonce), int(time.time()), body, model.id)
    asked = body.asked_tokens(body.max_output_tokens)
    turn = Turn(
        id=f"{reply.id[:64]}-{uuid.uuid4().hex}",
        model=model.id,
        params=body.sampling(asked or service.vault.config.default_tokens, None),
        messages=(*system, *items),
        session=key,
        learn=body.memory.learn,
        history=body.memory.history,
        base=previous.version if previous is not None else None,
        expect=expected,
        scope=caller.tenant,
        shorten=asked is None,
    )
    exchange = Exchange(service, caller, request, body, key, reply.body, reply, event_names=True)
    if stores and key is not None and body.memory.learn != "off":
        exchange.answer_key = f"response:{nonce}"
        exchange.wrap = lambda made: {"response": made, "items": items}
        exchange.unwrap = lambda kept: kept["response"]
    return await exchange.answer([turn])


def _nonce(request: Request, body: ResponsesRequest, caller: Caller) -> str:
    """Random, but the same for the same idempotency key, so that a retry finds what was stored."""
    given = request.headers.get("idempotency-key", body.request_id)
    if given is None:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{caller.tenant}\0{given}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


async def _kept(service: Service, caller: Caller, id: str) -> Kept:
    """The stored response of that id, if it is the caller's and still kept."""
    session, nonce = parse_id(id)
    missing = NotFound(f"response {id[:80]!r} does not exist, or is no longer kept")
    try:
        key = SessionKey(caller.tenant, session)
        stored = await service.store.answer(key, f"response:{nonce}")
    except RequestError:
        raise missing from None
    if stored is None:
        raise missing
    record = orjson.loads(stored.answer)
    return Kept(key, stored.version, record["response"], record["items"])


@router.get("/{id}")
async def get_response(id: str, service: ServiceDep, caller: CallerDep) -> dict[str, Any]:
    """A stored response."""
    return (await _kept(service, caller, id)).body


@router.get("/{id}/input_items")
async def list_input_items(
    id: str,
    service: ServiceDep,
    caller: CallerDep,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """A page of the input of a stored response, newest first unless `order` says otherwise."""
    kept = await _kept(service, caller, id)
    items = [
        {
            "type": "message",
            "id": f"msg_{number}_{id[5:]}",
            "role": item["role"],
            "status": "completed",
            "content": [{"type": "input_text", "text": item["content"]}],
        }
        for number, item in enumerate(kept.items)
    ]
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise RequestError(f"after is {after[:80]!r}, not an item of this response", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(items) > limit}


@router.delete("/{id}")
async def delete_response(id: str, service: ServiceDep, caller: CallerDep) -> dict[str, Any]:
    """Erase a stored response with the session it began. Refused when a memory stands on it."""
    kept = await _kept(service, caller, id)
    head = await service.store.head(kept.key)
    if not kept.key.session.startswith(OWN) or head is None or head.number != 1:
        raise Conflict(
            f"response {id[:80]!r} is part of session {kept.key.session!r}, whose memory has learned from it; delete "
            "the session, or reset or restore it"
        )
    await service.manager.delete(kept.key)
    return {"id": id, "object": "response.deleted", "deleted": True}
