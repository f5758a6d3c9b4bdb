"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nested_runtime.errors import RequestError
from nested_runtime.sessions import Turn

from ..deps import CallerDep, Expected, ServiceDep, session_key
from ..exchange import Exchange
from ..schemas.chat import ChatReply, ChatRequest
from ..schemas.chat_stream import ChatChunks
from ..schemas.common import known_but_unsupported

__all__ = ["router"]

router = APIRouter(tags=["chat"])


@router.post("/chat/completions")
async def create_chat_completion(
    request: Request, body: ChatRequest, service: ServiceDep, caller: CallerDep, expected: Expected
) -> Response:
    """Answer a conversation. With X-Session-ID (or session_id) the session's memory reads it and keeps it."""
    known_but_unsupported(body)
    model = service.model(body.model)
    session = session_key(request, body.session_id)
    count = body.n or 1
    if session is not None and count > 1:
        raise RequestError(f"n is {count}; a turn of a session has one answer, so n must be 1", param="n")
    if session is None and body.memory.surprise:
        raise RequestError(
            "memory.surprise is what a session's memory reads; send a session id, or ask for prompt_logprobs",
            param="memory.surprise",
        )
    asked = body.asked_tokens(body.max_completion_tokens)
    reply = ChatReply(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model.id,
        tokenizer=model.tokenizer,
        with_logprobs=body.alternatives is not None,
        with_prompt_logprobs=body.prompt_logprobs is not None,
        with_surprise=body.memory.surprise,
    )
    turns = [
        Turn(
            id=f"{reply.id}-{choice}",
            model=model.id,
            params=body.sampling(asked or service.vault.config.default_tokens, body.alternatives, choice),
            messages=body.conversation(),
            session=session,
            learn=body.memory.learn,
            history=body.memory.history,
            expect=expected,
            scope=caller.tenant,
            shorten=asked is None,
            fork_of=f"{reply.id}-0" if choice else None,
        )
        for choice in range(count)
    ]
    options = body.stream_options
    chunks = ChatChunks(reply, include_usage=bool(options and options.include_usage))
    return await Exchange(service, caller, request, body, session, reply.body, chunks).answer(turns)
